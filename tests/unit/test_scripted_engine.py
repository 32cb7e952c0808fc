"""The engine without a model: determinism, versions, and failures on demand."""

import asyncio
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.engine import Engine, GenerateRequest, WeightUpdate
from rollout.scripted_engine import Faults, Scripted, ScriptedEngine, invented_logprob
from rollout.types import FinishReason, SamplingParams

PARAMS = SamplingParams(max_tokens=8)


def script(prompt: tuple[int, ...], seed: int) -> Scripted:
    tokens = (*prompt[-2:], seed % 100, 2)
    return Scripted(token_ids=tokens, text="".join(chr(97 + t % 26) for t in tokens[:-1]))


def request(index: int, prompt: tuple[int, ...] = (1, 5, 6)) -> GenerateRequest:
    return GenerateRequest(prompt_token_ids=prompt, sample_index=index, seed=1000 + index)


def update(version: int, **changes) -> WeightUpdate:
    plain = WeightUpdate(
        version=version,
        backend="shm",
        names=("a", "b"),
        dtypes=("float32", "float32"),
        shapes=((2, 3), (4,)),
        checksum="00112233445566778899aabbccddeeff",
        payload={},
    )
    return replace(plain, **changes)


def generate(engine: ScriptedEngine, *requests: GenerateRequest, params: SamplingParams = PARAMS):
    return asyncio.run(engine.generate(requests, params))


def test_it_is_an_engine_and_says_what_the_script_says():
    engine = ScriptedEngine(script)
    typed: Engine = engine
    assert typed.policy_version == -1
    one, two = generate(engine, request(0), request(1))
    assert one.token_ids == (5, 6, 0, 2) and two.token_ids == (5, 6, 1, 2)
    assert one.text == "fga"
    assert (one.sample_index, two.sample_index, two.seed) == (0, 1, 1001)
    assert one.prompt_token_ids == (1, 5, 6)
    assert one.finish_reason is FinishReason.STOP
    assert engine.requests == [request(0), request(1)]


@given(st.permutations(range(6)))
def test_a_completion_depends_on_prompt_and_seed_alone(order):
    straight = {c.seed: c for c in generate(ScriptedEngine(script), *map(request, range(6)))}
    engine = ScriptedEngine(script)
    shuffled = [c for index in order for c in generate(engine, request(index))]
    assert {c.seed: c for c in shuffled} == straight


def test_logprobs_are_given_by_the_script_or_made_up():
    fixed = ScriptedEngine(lambda *_: Scripted(token_ids=(7, 2), text="h", logprobs=(-0.5, -0.25)))
    assert generate(fixed, request(0))[0].rollout_logprobs == (-0.5, -0.25)
    made_up = generate(ScriptedEngine(script), request(0))[0]
    assert made_up.rollout_logprobs[1] == invented_logprob((1, 5, 6, 5, 6), 0)
    assert len(set(made_up.rollout_logprobs)) == 4 and all(-5 < p <= 0 for p in made_up.rollout_logprobs)


@pytest.mark.parametrize(("max_tokens", "context", "expected"), [(3, 100, 3), (4, 100, 4), (8, 5, 2), (8, 4, 1)])
def test_completions_are_cut_at_the_limit_and_at_the_context(max_tokens, context, expected):
    engine = ScriptedEngine(script, max_model_len=context)
    completion = generate(engine, request(0), params=SamplingParams(max_tokens=max_tokens))[0]
    assert len(completion.token_ids) == len(completion.rollout_logprobs) == expected
    assert completion.finish_reason is (FinishReason.STOP if expected == 4 else FinishReason.LENGTH)


def test_a_prompt_without_room_is_refused():
    with pytest.raises(ValueError, match="a prompt of 3 tokens leaves no room in a context of 3"):
        generate(ScriptedEngine(script, max_model_len=3), request(0))


def test_updates_set_the_version_of_what_follows():
    engine = ScriptedEngine(script)
    assert asyncio.run(engine.update_weights(update(4))) == update(4).checksum
    assert engine.policy_version == 4
    assert generate(engine, request(0))[0].policy_version == 4
    assert [u.version for u in engine.updates] == [4]


def test_a_request_keeps_the_version_that_it_began_with():
    engine = ScriptedEngine(script, faults=Faults(delay_s=0.05))

    async def overlap():
        running = asyncio.create_task(engine.generate([request(0)], PARAMS))
        await asyncio.sleep(0.01)
        await engine.update_weights(update(0))
        return (await running)[0].policy_version

    assert asyncio.run(overlap()) == -1
    assert engine.policy_version == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (update(0, checksum="xyz"), "hex digest, got 'xyz'"),
        (update(0, checksum=""), "hex digest"),
        (update(0, shapes=((1,),)), "2 names, 2 dtypes, 1 shapes"),
    ],
)
def test_malformed_updates_are_refused_and_change_nothing(bad, message):
    engine = ScriptedEngine(script)
    with pytest.raises(ValueError, match=message):
        asyncio.run(engine.update_weights(bad))
    assert engine.policy_version == -1 and not engine.updates


def test_a_lost_update_is_confirmed_and_not_taken_over():
    engine = ScriptedEngine(script, faults=Faults(lose_update=1))
    assert asyncio.run(engine.update_weights(update(1))) == update(1).checksum
    assert engine.policy_version == -1


def test_a_wrong_digest_is_still_a_digest():
    engine = ScriptedEngine(script, faults=Faults(wrong_digest=1))
    digest = asyncio.run(engine.update_weights(update(1)))
    assert digest != update(1).checksum and len(digest) == len(update(1).checksum)


def test_scores_depend_on_what_stands_before_and_on_the_weights():
    engine = ScriptedEngine(script)
    one = asyncio.run(engine.score_tokens([1, 2, 3]))
    assert len(one) == 2
    assert asyncio.run(engine.score_tokens([1, 2, 4]))[0] == one[0]
    assert asyncio.run(engine.score_tokens([9, 2, 3]))[1] != one[1]
    asyncio.run(engine.update_weights(update(0)))
    assert asyncio.run(engine.score_tokens([1, 2, 3])) != one


def test_the_canary_is_the_prompt_and_its_continuation_with_scores():
    engine = ScriptedEngine(script)
    ((tokens, logprobs), short) = asyncio.run(engine.canary([[1, 5, 6], [1, 7]], 2))
    assert tokens == [1, 5, 6, 5, 6] and short[0] == [1, 7, 1, 7]
    assert logprobs == asyncio.run(engine.score_tokens(tokens)) and len(logprobs) == 4
    asyncio.run(engine.update_weights(update(0)))
    assert asyncio.run(engine.canary([[1, 5, 6]], 2))[0][1] != logprobs


def test_the_nth_request_fails_and_only_that():
    engine = ScriptedEngine(script, faults=Faults(raise_on=2))
    generate(engine, request(0))
    with pytest.raises(RuntimeError, match="scripted failure of request 2"):
        generate(engine, request(1))
    assert generate(engine, request(1))[0].seed == 1001


def test_the_nth_request_hangs():
    engine = ScriptedEngine(script, faults=Faults(hang_on=1))

    async def hang():
        await asyncio.wait_for(engine.generate([request(0)], PARAMS), 0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(hang())
    assert generate(engine, request(0))


def test_delays_of_one_batch_overlap():
    engine = ScriptedEngine(script, faults=Faults(delay_s=0.1))
    start = time.monotonic()
    generate(engine, *map(request, range(20)))
    assert 0.1 <= time.monotonic() - start < 1.0


def test_a_closed_engine_answers_nothing():
    engine = ScriptedEngine(script)
    asyncio.run(engine.close())
    asyncio.run(engine.close())
    for attempt in (
        engine.generate([request(0)], PARAMS),
        engine.update_weights(update(0)),
        engine.score_tokens([1, 2]),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            asyncio.run(attempt)
