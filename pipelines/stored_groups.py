"""What a stored group of rollouts must be before a run goes on with it, or a step is computed from it again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipelines.files import RunDirError
from rewards.rubric import RubricConfig
from rollout.types import Rollout, RolloutGroup

_MOST_LOGPROB = 1e-3  # nats; above 0 only by rounding


def check_stored(path: Path, group: RolloutGroup, rewards: RubricConfig) -> None:
    """Refuses a stored group that was changed into what no run writes.

    NaN and -inf among the log-probabilities pass: an engine may say so, and the learner skips and tells of the update.

    Args:
        path: of its journal, for the message.
        group: as it was read.
        rewards: the functions that may have scored it.

    Raises:
        RunDirError: names the file, the problem and the value.
    """
    for rollout in group.rollouts:
        wrong = _wrong(rollout, {function.name for function in rewards.functions})
        if wrong:
            raise RunDirError(
                f"{path}: problem {group.problem.id}, sample {rollout.completion.sample_index}: {wrong}; the line was "
                "changed: put it back, or delete it (a run then draws the group again)"
            )


def _wrong(rollout: Rollout, functions: Collection[str]) -> str | None:
    said = rollout.completion
    if not all(type(token) is int for token in (*said.prompt_token_ids, *said.token_ids)):
        return "a token id is no whole number"
    for value in said.rollout_logprobs:
        if not _is_number(value):
            return f"the log-probability {value!r} is no number"
        if value > _MOST_LOGPROB:
            return f"the log-probability {value!r} is that of a probability above 1"
    if said.routed_experts is not None and not isinstance(said.routed_experts, str):
        return f"routed_experts {said.routed_experts!r} is no text"
    for name, value in rollout.scores.items() if isinstance(rollout.scores, dict) else [("scores", rollout.scores)]:
        if name not in functions:
            return f"it has a score of {name!r}, which is no reward function of the stage"
        if not _is_number(value):
            return f"the score {value!r} of {name!r} is no number"
    wrong = [v for v in (rollout.reward, rollout.advantage) if v is not None and not _is_number(v)]
    return f"the reward or advantage {wrong[0]!r} is no number" if wrong else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
