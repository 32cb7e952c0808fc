"""The shared vocabulary: seeds, validation, and the JSON form of the journal."""

import hashlib
import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.types import (
    Completion,
    FinishReason,
    Problem,
    Rollout,
    RolloutGroup,
    SamplingParams,
    group_from_json,
    group_to_json,
    sampling_seed,
)


def test_sampling_seed_is_a_hash_of_what_is_sampled():
    digest = hashlib.blake2b(b"7/12/chain_sum-ab-3/5", digest_size=8).digest()
    assert sampling_seed(7, 12, "chain_sum-ab-3", 5) == int.from_bytes(digest, "big") >> 1


@given(st.integers(), st.integers(0, 10**6), st.text(max_size=20), st.integers(0, 1000))
def test_sampling_seed_fits_a_signed_64_bit_integer(run_seed, step, problem_id, index):
    assert 0 <= sampling_seed(run_seed, step, problem_id, index) < 2**63


def test_sampling_seeds_differ_in_every_argument():
    base = (1, 2, "a", 3)
    others = [(0, 2, "a", 3), (1, 0, "a", 3), (1, 2, "b", 3), (1, 2, "a", 0)]
    assert len({sampling_seed(*key) for key in [base, *others]}) == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("max_tokens", 0),
    ],
)
def test_sampling_params_out_of_range_name_themselves(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_greedy_is_allowed():
    assert SamplingParams(temperature=0.0).temperature == 0.0


def test_values_are_frozen():
    problem = Problem(id="a", prompt="1+1")
    with pytest.raises(FrozenInstanceError):
        problem.prompt = "2+2"  # type: ignore[misc]
    assert replace(problem, prompt="2+2").id == "a"


finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def groups(draw):
    rollouts = []
    for index in range(draw(st.integers(0, 3))):
        tokens = tuple(draw(st.lists(st.integers(0, 2**17), max_size=4)))
        completion = Completion(
            prompt_token_ids=tuple(draw(st.lists(st.integers(0, 9), max_size=3))),
            token_ids=tokens,
            text=draw(st.text(max_size=8)),
            rollout_logprobs=tuple(draw(finite) for _ in tokens),
            finish_reason=draw(st.sampled_from(FinishReason)),
            policy_version=draw(st.integers(-1, 99)),
            sample_index=index,
            seed=draw(st.integers(0, 2**63 - 1)),
        )
        rollouts.append(
            Rollout(
                completion=completion,
                scores=draw(st.dictionaries(st.text(max_size=5), finite, max_size=2)),
                errors=draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)),
                metrics=draw(st.dictionaries(st.text(max_size=5), finite, max_size=2)),
                reward=draw(st.none() | finite),
                advantage=draw(st.none() | finite),
            )
        )
    problem = Problem(
        id="p", prompt=draw(st.text()), answer=draw(st.none() | st.text()), metadata={"entry": {"a": [1]}}
    )
    return RolloutGroup(problem=problem, rollouts=tuple(rollouts))


@given(groups())
def test_a_group_survives_json_bit_for_bit(group):
    assert group_from_json(json.loads(json.dumps(group_to_json(group)))) == group


def test_a_torn_row_is_not_read_as_a_group():
    row = group_to_json(RolloutGroup(problem=Problem(id="a", prompt="b"), rollouts=()))
    del row["rollouts"]
    with pytest.raises(KeyError):
        group_from_json(row)
