"""What ``r1 verify`` measures on: the recipe's own problems in its own template, and what an engine says to them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipelines.evaluate import EvalStage
from pipelines.grpo import GrpoStage
from pipelines.sft import SftStage, encode_demonstration, resolve_target
from pipelines.weight_sync import before_ties
from rollout.engine import GenerateRequest
from rollout.prompts import DataConfig, load_problems
from rollout.template import render_prompt
from rollout.types import (
    Completion,
    FinishReason,
    Problem,
    Rollout,
    RolloutGroup,
    SamplingParams,
    sampling_seed,
)  # fmt: skip

if TYPE_CHECKING:
    from pipelines.config import Recipe
    from policy.batch import Sample

_SIBLINGS = 2  # samples per problem
_STEP = -2  # part of the sampling seeds: no step of a run has it


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What an engine is asked.

    Attributes:
        requests: prompt and seed of each sample.
        sampling: how it is drawn; temperature > 0, and the whole distribution.
    """

    requests: tuple[GenerateRequest, ...]
    sampling: SamplingParams


def choose_stage(recipe: Recipe, name: str | None) -> SftStage | GrpoStage:
    """The stage whose learner is verified: the one of this name, else the first of RL, else the first of SFT.

    Raises:
        ValueError: there is no such stage, or none that trains.
    """
    trained = [stage for stage in recipe.stages if isinstance(stage, SftStage | GrpoStage)]
    if name is not None:
        for stage in trained:
            if name in (stage.name, stage.kind):
                return stage
        known = ", ".join(stage.name for stage in trained) or "none"
        raise ValueError(f"--stage {name}: the recipe has no training stage of that name (there are: {known})")
    for stage in sorted(trained, key=lambda each: isinstance(each, SftStage)):
        return stage
    raise ValueError(f"recipe {recipe.name} has no stage that trains (sft, grpo): there is nothing to verify")


def questions(
    recipe: Recipe, stage: Any, tokenizer: Any, *, count: int, max_tokens: int, experts: bool
) -> Questions | None:
    """What the recipe's engine is asked; None when the recipe never samples.

    Args:
        stage: whose prompts; of an ``sft`` stage those of the recipe's first held-out set.
        count: samples, two to a problem.
        max_tokens: most tokens of a completion, beside the recipe's own limit.
        experts: ask for the experts of each token too.

    Raises:
        ValueError: the data cannot be read, or a prompt does not fit into the context.
    """
    if isinstance(stage, GrpoStage):
        problems = some_problems(stage.data, -(-count // _SIBLINGS))
        template, sampling = stage.template, stage.sampling
    else:
        held_out = [item for each in recipe.stages if isinstance(each, EvalStage) for item in each.sets]
        if not held_out:
            return None
        item = held_out[0]
        short = item if item.data is None else replace(item, data=_fewer(item.data, count))
        problems, template, sampling = short.load()[: -(-count // _SIBLINGS)], item.template, item.sampling
    sampling = replace(
        sampling, temperature=sampling.temperature or 1.0, top_p=1.0, top_k=0,
        max_tokens=min(sampling.max_tokens, max_tokens),
    )  # fmt: skip
    requests = [
        GenerateRequest(
            prompt_token_ids=_prompt(recipe, problem, tokenizer, template),
            sample_index=index,
            seed=sampling_seed(recipe.seed, _STEP, problem.id, index),
            routed_experts=experts,
        )
        for problem in problems
        for index in range(_SIBLINGS)
    ]
    return Questions(requests=tuple(requests[:count]), sampling=sampling)


def some_problems(data: DataConfig, count: int) -> list[Problem]:
    """At most ``count`` problems of a data set; a generator is not asked for more."""
    problems = load_problems(_fewer(data, count))
    return problems[:count]


def ragged_samples(completions: Sequence[Completion], seed: int) -> list[Sample]:
    """Completions as samples of many lengths, with advantages drawn at random.

    An untrained policy never ends by itself: what was cut off by the limit is cut again, at a length drawn at random.
    Advantages are drawn because real ones may all be zero, and then nothing could be measured.
    """
    from policy.batch import samples_from_groups

    draw = random.Random(f"{seed}/verify")
    groups = [
        RolloutGroup(
            problem=Problem(id=str(index), prompt=""), rollouts=(Rollout(completion=completion, advantage=1.0),)
        )
        for index, completion in enumerate(completions)
    ]
    samples = []
    for completion, sample in zip(completions, samples_from_groups(groups, mask_truncated=False), strict=True):
        length = len(completion.token_ids)
        if completion.finish_reason is FinishReason.LENGTH:
            length = draw.randint(1, length)
        samples.append(cut_sample(replace(sample, advantage=draw.gauss(0.0, 1.0)), length))
    return samples


def cut_sample(sample: Sample, length: int) -> Sample:
    """The sample with the first ``length`` (>= 1) tokens of its completion."""
    experts, end = sample.routed_experts, sample.prompt_length + length
    return replace(
        sample,
        token_ids=sample.token_ids[:end],
        rollout_logprobs=None if sample.rollout_logprobs is None else sample.rollout_logprobs[:length],
        routed_experts=None if experts is None else experts[: end - 1],
    )


def before_tied_choices(samples: Sequence[Sample], margins: Sequence[Sequence[float]], dtype: str) -> list[Sample]:
    """Samples cut off before the first choice of a router that rounding could turn; none when most would be lost.

    Args:
        margins: of the choice for each token but the last (``LearnerService.router_margins``).
        dtype: in which is computed.
    """
    kept = []
    for sample, settled in zip(samples, before_ties(margins, dtype), strict=True):
        length = min(settled + 1, len(sample.token_ids)) - sample.prompt_length
        if length >= 1:
            kept.append(cut_sample(sample, length))
    left, before = (sum(len(s.token_ids) for s in part) for part in (kept, samples))
    return kept if len(kept) >= 2 and left > before / 2 else []


def random_completions(asked: Questions, vocabulary: int, seed: int) -> list[Completion]:
    """Random tokens after the prompts, where no engine is started: cutting must not matter whatever the tokens are."""
    draw = random.Random(f"{seed}/random")
    found = []
    for request in asked.requests:
        tokens = tuple(draw.randrange(vocabulary) for _ in range(draw.randint(1, asked.sampling.max_tokens)))
        found.append(
            Completion(
                prompt_token_ids=request.prompt_token_ids, token_ids=tokens, text="",
                rollout_logprobs=tuple(draw.gauss(-5.0, 0.5) for _ in tokens), finish_reason=FinishReason.STOP,
                policy_version=0, sample_index=request.sample_index, seed=request.seed,
            )
        )  # fmt: skip
    return found


def demonstrations(recipe: Recipe, stage: SftStage, tokenizer: Any, count: int) -> list[Sample]:
    """What an ``sft`` stage imitates, as it is trained on; every advantage is 1, which gives the gradient of SFT.

    Raises:
        ValueError: the data, or the target's function or column, cannot be read, or a demonstration is too long.
    """
    from policy.batch import Sample

    demonstrate = resolve_target(stage)
    samples = []
    for index, problem in enumerate(some_problems(stage.data, count)):
        text = demonstrate(problem, random.Random(f"{recipe.seed}/verify/{index}"))
        ids, prompt = encode_demonstration(problem, text, stage.template, tokenizer, recipe.engine.max_model_len)
        samples.append(Sample(token_ids=tuple(ids), prompt_length=prompt, advantage=1.0))
    return samples


def as_groups(samples: Sequence[Sample]) -> list[RolloutGroup]:
    """Samples in the form in which a learner's service takes them."""
    groups = []
    for index, sample in enumerate(samples):
        completion = Completion(
            prompt_token_ids=sample.token_ids[: sample.prompt_length],
            token_ids=sample.token_ids[sample.prompt_length :], text="",
            rollout_logprobs=sample.rollout_logprobs or (), finish_reason=FinishReason.STOP, policy_version=0,
        )  # fmt: skip
        rollout = Rollout(completion=completion, reward=sample.advantage, advantage=sample.advantage)
        groups.append(RolloutGroup(problem=Problem(id=str(index), prompt=""), rollouts=(rollout,)))
    return groups


def _fewer(data: DataConfig, count: int) -> DataConfig:
    return replace(data, size=min(data.size, count)) if data.size else data


def _prompt(recipe: Recipe, problem: Problem, tokenizer: Any, template: str) -> tuple[int, ...]:
    ids = tuple(render_prompt(problem, tokenizer, template))
    limit = recipe.engine.max_model_len
    if len(ids) + 2 > limit:
        raise ValueError(
            f"problem {problem.id}: its prompt takes {len(ids)} tokens and leaves no room in the context of {limit} "
            "(engine.max_model_len): raise it or filter the data"
        )
    return ids
