import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.batch import MicroBatch, Sample, check_token_ids, pack, pack_fill, samples_from_groups
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup

HAND = Sample(token_ids=(5, 6, 7, 8, 9), prompt_length=2, rollout_logprobs=(-0.1, -0.2, -0.3), advantage=1.5)


def completion(*, finish: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(
        prompt_token_ids=(5, 6),
        token_ids=(7, 8, 9),
        text="x",
        rollout_logprobs=(-0.1, -0.2, -0.3),
        finish_reason=finish,
        policy_version=0,
    )


def group(*rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(problem=Problem(id="p", prompt="?"), rollouts=rollouts)


def test_the_shift_by_hand() -> None:
    (micro,) = pack([HAND], 100)
    assert micro.input_ids.tolist() == [[5, 6, 7, 8]]  # the last token is never fed
    assert micro.position_ids.tolist() == [[0, 1, 2, 3]]
    assert micro.loss_mask.tolist() == [False, True, True, True]  # position of token 6 predicts 7, and so on
    assert micro.loss_index.tolist() == [1, 2, 3]
    assert micro.targets.tolist() == [7, 8, 9]
    assert micro.rollout_logprobs is not None
    assert micro.rollout_logprobs.tolist() == [-0.1, -0.2, -0.3]
    assert micro.advantages.tolist() == [1.5, 1.5, 1.5]
    assert (micro.tokens, micro.loss_tokens, micro.segment_lengths) == (4, 3, [4])


def test_two_sequences_by_hand_longest_first() -> None:
    short = Sample(token_ids=(1, 2), prompt_length=1, rollout_logprobs=(-3.0,), advantage=-0.5)
    (micro,) = pack([short, HAND], 100)
    assert micro.input_ids.tolist() == [[5, 6, 7, 8, 1]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 0]]
    assert micro.segment_lengths == [4, 1]
    assert micro.loss_mask.tolist() == [False, True, True, True, True]
    assert micro.targets.tolist() == [7, 8, 9, 2]
    assert micro.advantages.tolist() == [1.5, 1.5, 1.5, -0.5]
    assert micro.sequence_index.tolist() == [1, 1, 1, 0]
    assert micro.sequence_lengths.tolist() == [3, 3, 3, 1]
    assert micro.sample_index == [1, 0]


def test_demonstrations_need_no_logprobs() -> None:
    (micro,) = pack([Sample(token_ids=(1, 2, 3), prompt_length=1)], 8)
    assert micro.rollout_logprobs is None
    assert micro.targets.tolist() == [2, 3]


def of_sizes(*sizes: int) -> list[Sample]:
    return [Sample(token_ids=tuple(range(n + 1)), prompt_length=1) for n in sizes]


def test_best_fit_by_hand() -> None:
    samples = of_sizes(2, 8, 3, 4, 5)
    # 8 opens one, 5 another, 4 fits behind the 8 exactly, 3 behind the 5, 2 behind those
    assert [m.segment_lengths for m in pack(samples, 12)] == [[8, 4], [5, 3, 2]]
    assert [m.sample_index for m in pack(samples, 12)] == [[1, 3], [4, 2, 0]]
    # 11: the 3 leaves no room behind the 8 and 3 behind the 5: best fit takes the 8
    assert [m.segment_lengths for m in pack(samples, 11)] == [[8, 3], [5, 4, 2]]
    assert [m.segment_lengths for m in pack(samples, 4)] == [[8], [5], [4], [3], [2]]
    assert [m.segment_lengths for m in pack(of_sizes(9, 9, 1), 10)] == [[9, 1], [9]]  # a tie goes to the earlier one


def test_a_model_that_pads_gets_similar_lengths() -> None:
    samples = of_sizes(2, 8, 3, 4)
    # sorted 8, 4, 3, 2: 2 x 8 > 12; 3 x 4 = 12 fits exactly
    assert [m.segment_lengths for m in pack(samples, 12, padded=True)] == [[8], [4, 3, 2]]
    assert [m.segment_lengths for m in pack(samples, 11, padded=True)] == [[8], [4, 3], [2]]
    assert [m.segment_lengths for m in pack(samples, 1, padded=True)] == [[8], [4], [3], [2]]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["geometric", "lognormal"]), st.integers(0, 10_000))
def test_micro_batches_but_the_last_are_full(shape: str, seed: int) -> None:
    """Ragged batches as RL has them: 96 to 512 sequences, a micro-batch of about sixteen."""
    draw = random.Random(seed)
    count, limit = draw.randint(96, 512), 512
    if shape == "geometric":
        lengths = [min(limit, 2 + int(draw.expovariate(1 / 30))) for _ in range(count)]
    else:
        lengths = [min(limit, 2 + int(draw.lognormvariate(3, 1))) for _ in range(count)]
    micros = pack(of_sizes(*lengths), limit)
    fullest_first = sorted((m.tokens for m in micros), reverse=True)
    assert all(tokens >= 0.95 * limit for tokens in fullest_first[:-1])
    assert pack_fill(micros, limit) == pytest.approx(sum(lengths) / (len(micros) * limit))


def test_fill_by_hand() -> None:
    micros = pack(of_sizes(20, 8, 4), 10)
    assert [m.tokens for m in micros] == [20, 8, 4]
    assert pack_fill(micros, 10) == 32 / 40  # the long one fills its own


def test_empty_batch() -> None:
    assert pack([], 10) == []


lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=20)


@given(lengths, st.integers(1, 60), st.booleans())
def test_every_token_lands_exactly_once(shapes: list[tuple[int, int]], limit: int, padded: bool) -> None:
    token = iter(range(10_000))
    samples = [
        Sample(token_ids=tuple(next(token) for _ in range(p + c)), prompt_length=p, advantage=float(i))
        for i, (p, c) in enumerate(shapes)
    ]
    micros = pack(samples, limit, padded=padded)
    assert sorted(i for m in micros for i in m.sample_index) == list(range(len(samples)))
    assert sorted(t for m in micros for t in m.targets.tolist()) == sorted(
        t for s in samples for t in s.token_ids[s.prompt_length :]
    )
    for micro in micros:
        places = len(micro.segment_lengths) * max(micro.segment_lengths) if padded else micro.tokens
        assert len(micro.segment_lengths) == 1 or places <= limit
        assert sum(micro.segment_lengths) == micro.tokens == len(micro.loss_mask)
        assert micro.segment_lengths == sorted(micro.segment_lengths, reverse=True)
        # the token before each target is the input at its position, within the same sequence
        before = micro.input_ids[0, micro.loss_index]
        assert torch.equal(before + 1, micro.targets)
        assert torch.equal(micro.advantages.long(), micro.sequence_index)


@given(lengths, st.integers(1, 60))
def test_packing_is_deterministic(shapes: list[tuple[int, int]], limit: int) -> None:
    samples = [Sample(token_ids=tuple(range(p + c)), prompt_length=p) for p, c in shapes]
    for one, other in zip(pack(samples, limit), pack(samples, limit), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert one.sample_index == other.sample_index


def test_samples_are_the_rollouts_with_an_advantage() -> None:
    cut = replace(Rollout(completion=completion(finish=FinishReason.LENGTH)), advantage=-1.0)
    good = Rollout(completion=completion(), advantage=1.5)
    dropped = Rollout(completion=completion(), reward=1.0)
    groups = [group(good, dropped), group(cut)]
    assert samples_from_groups(groups, mask_truncated=False) == [HAND, replace(HAND, advantage=-1.0)]
    assert samples_from_groups(groups, mask_truncated=True) == [HAND]
    assert samples_from_groups([], mask_truncated=True) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ids": (1, 2), "prompt_length": 0}, "prompt of at least one token"),
        ({"token_ids": (1, 2), "prompt_length": 2}, "at least one token after its prompt"),
        ({"token_ids": (1, 2), "prompt_length": 1, "rollout_logprobs": (0.0, 0.0)}, "2 rollout_logprobs for"),
    ],
)
def test_impossible_samples_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sample(**fields)


def test_pack_refuses_what_it_cannot_pack() -> None:
    with pytest.raises(ValueError, match="micro_batch_tokens must be >= 1"):
        pack([HAND], 0)
    with pytest.raises(ValueError, match="1 of 2 samples have no rollout_logprobs"):
        pack([HAND, replace(HAND, rollout_logprobs=None)], 10)


def test_to_keeps_everything() -> None:
    (micro,) = pack([HAND], 10)
    moved = micro.to(torch.device("cpu"))
    assert isinstance(moved, MicroBatch)
    assert torch.equal(moved.targets, micro.targets)
    assert moved.segment_lengths == micro.segment_lengths


@pytest.mark.parametrize("bad", [-1, 320, 2**63, 9.7])
@pytest.mark.parametrize("place", [0, 2])
def test_tokens_that_the_model_does_not_have_are_named(bad: Any, place: int) -> None:
    good = Sample(token_ids=(0, 319, 5), prompt_length=1)
    check_token_ids([good], 320)
    ids = [0, 319, 5]
    ids[place] = bad
    with pytest.raises(ValueError, match=rf"^token {place} of sample 1 is {bad}, the model has 0..319: was the sample"):
        check_token_ids([good, replace(good, token_ids=tuple(ids))], 320)
