"""Rollout groups for the tests of rewards."""

from pathlib import Path

from rewards import RewardConfig
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup

FUNCTIONS = Path(__file__).with_name("reward_functions.py")


def reward(name: str, **options) -> RewardConfig:
    """A function of tests/unit/reward_functions.py."""
    return RewardConfig(path=f"{FUNCTIONS}:{name}", **options)


def completion(text: str = "t</think>1", index: int = 0, tokens: int = 3, seed: int | None = None) -> Completion:
    return Completion(
        prompt_token_ids=(1, 2),
        token_ids=tuple(range(tokens)),
        text=text,
        rollout_logprobs=(-0.5,) * tokens,
        finish_reason=FinishReason.STOP,
        policy_version=0,
        sample_index=index,
        seed=index if seed is None else seed,
    )


def group(size: int = 4, *, problem: Problem | None = None, text: str = "t</think>1", number: int = 0) -> RolloutGroup:
    problem = problem or Problem(id=f"p{number}", prompt="1+0", answer="1")
    return RolloutGroup(
        problem=problem,
        rollouts=tuple(
            Rollout(completion=completion(text, index, index + 1, seed=100 * number + index)) for index in range(size)
        ),
    )
