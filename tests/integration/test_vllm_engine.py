"""vLLM behind the Engine protocol, for real: one engine for the module, a second one to be killed."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch

from policy.checkpoint import save_model
from policy.config import ModelConfig
from policy.loading import load_policy
from rollout.engine import Engine, EngineConfig, EngineDied, GenerateRequest
from rollout.types import Completion, FinishReason, SamplingParams
from rollout.vllm_engine import VllmEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTEXT = 128
# Four heads: the upstream rotary kernel is right for one. A wide initialisation: sharp distributions show small errors.
MODEL = ModelConfig(
    preset="tiny", overrides={"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.15}
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, object, Path]:
    model, tokenizer = load_policy(MODEL, seed=5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    folder = tmp_path_factory.mktemp("model")
    save_model(model, tokenizer, folder)
    return model, tokenizer, folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(policy: tuple[torch.nn.Module, object, Path]) -> AsyncIterator[VllmEngine]:
    config = EngineConfig(max_model_len=CONTEXT, kv_cache_gib=0.25)
    engine = await VllmEngine.create(policy[2], config, cores=str(min(os.sched_getaffinity(0))))
    yield engine
    await engine.close()
    await engine.close()


def requests(count: int, seed: int = 0) -> list[GenerateRequest]:
    rng = random.Random(seed)
    return [
        GenerateRequest(
            prompt_token_ids=tuple(rng.randrange(256) for _ in range(rng.randrange(1, 30))),
            sample_index=i,
            seed=900 + i,
        )
        for i in range(count)
    ]


@torch.no_grad()
def learner_logprobs(model: torch.nn.Module, tokens: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Log-probabilities of tokens 1..T-1 by the model itself, on its own."""
    ids = torch.tensor([list(tokens)])
    logits = model(input_ids=ids).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()


def sampled_by(model: torch.nn.Module, completion: Completion, temperature: float = 1.0) -> list[float]:
    tokens = [*completion.prompt_token_ids, *completion.token_ids]
    return learner_logprobs(model, tokens, temperature)[len(completion.prompt_token_ids) - 1 :]


async def test_completions_say_what_was_asked_sampled_and_by_which_version(engine: Engine, policy) -> None:
    model, tokenizer, _ = policy
    asked = requests(24)
    answers = await engine.generate(asked, SamplingParams(max_tokens=60))
    for request, answer in zip(asked, answers, strict=True):
        assert (answer.prompt_token_ids, answer.sample_index) == (request.prompt_token_ids, request.sample_index)
        assert answer.seed == request.seed and answer.policy_version == -1
        assert len(answer.token_ids) == len(answer.rollout_logprobs) <= 60
        ended = answer.token_ids[-1] == tokenizer.eos_token_id
        assert answer.finish_reason == (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert answer.text == tokenizer.decode(answer.token_ids[:-1] if ended else answer.token_ids)
        assert answer.rollout_logprobs == pytest.approx(sampled_by(model, answer), abs=2e-5)
    assert {answer.finish_reason for answer in answers} == {FinishReason.STOP, FinishReason.LENGTH}
    assert any("<think>" in answer.text or "<answer>" in answer.text for answer in answers)  # special tokens stay


async def test_logprobs_are_those_after_temperature(engine: Engine, policy) -> None:
    answers = await engine.generate(requests(4), SamplingParams(max_tokens=20, temperature=0.6))
    for answer in answers:
        assert answer.rollout_logprobs == pytest.approx(sampled_by(policy[0], answer, 0.6), abs=2e-5)


async def test_top_k_of_one_is_certain(engine: Engine) -> None:
    [answer] = await engine.generate(requests(1), SamplingParams(max_tokens=8, top_k=1))
    assert answer.rollout_logprobs == pytest.approx([0.0] * len(answer.token_ids), abs=1e-6)


async def test_temperature_zero_is_greedy(engine: Engine, policy) -> None:
    [answer] = await engine.generate(requests(1), SamplingParams(max_tokens=12, temperature=0.0))
    tokens = list(answer.prompt_token_ids)
    for token in answer.token_ids:
        with torch.no_grad():
            assert token == policy[0](input_ids=torch.tensor([tokens])).logits[0, -1].argmax()
        tokens.append(token)


async def test_every_batch_gives_the_same_tokens_and_the_same_bits(engine: Engine) -> None:
    asked, params = requests(48), SamplingParams(max_tokens=40)
    whole = await engine.generate(asked, params)
    assert await engine.generate(asked, params) == whole
    assert (await engine.generate(asked[::-1], params))[::-1] == whole
    for size in (1, 2, 3, 5, 16):
        some = asked if size > 3 else asked[:8]
        parts = [await engine.generate(some[i : i + size], params) for i in range(0, len(some), size)]
        assert [c for part in parts for c in part] == whole[: len(some)], f"batches of {size}"

    async def late(request: GenerateRequest) -> Completion:
        await asyncio.sleep(0.01 * (request.sample_index % 7))
        return (await engine.generate([request], params))[0]

    assert await asyncio.gather(*[late(request) for request in asked]) == whole


async def test_another_seed_is_another_completion(engine: Engine) -> None:
    prompt = (1, 2, 3)
    asked = [GenerateRequest(prompt_token_ids=prompt, sample_index=0, seed=seed) for seed in (1, 1, 2, 2**62)]
    a, b, c, d = await engine.generate(asked, SamplingParams(max_tokens=16))
    assert a == b
    assert len({a.token_ids, c.token_ids, d.token_ids}) == 3


async def test_a_stop_string_ends_the_text_before_itself(engine: Engine) -> None:
    asked, params = requests(16), SamplingParams(max_tokens=60)
    free = await engine.generate(asked, params)
    found = ((i, re.search(r"(?<=...)[!-~]{2}", c.text, re.DOTALL)) for i, c in enumerate(free))
    index, stop = next((i, match.group()) for i, match in found if match)
    [cut] = await engine.generate([asked[index]], SamplingParams(max_tokens=60, stop=(stop,)))
    assert cut.text == free[index].text.partition(stop)[0] and cut.finish_reason == FinishReason.STOP
    assert cut.token_ids == free[index].token_ids[: len(cut.token_ids)]
    [uncut] = await engine.generate([asked[index]], SamplingParams(max_tokens=60, stop=("never said",)))
    assert uncut == free[index]


async def test_a_completion_ends_at_the_context(engine: Engine) -> None:
    asked = GenerateRequest(prompt_token_ids=(7,) * (CONTEXT - 3), sample_index=0, seed=1)
    [answer] = await engine.generate([asked], SamplingParams(max_tokens=60))
    assert 1 <= len(answer.token_ids) <= 3


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 50])
async def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(engine: Engine, length: int) -> None:
    asked = GenerateRequest(prompt_token_ids=(1,) * length, sample_index=0, seed=1)
    with pytest.raises(ValueError, match=rf"prompt of {length} tokens .* context of {CONTEXT}: .*engine.max_model_len"):
        await engine.generate([*requests(2), asked], SamplingParams())
    with pytest.raises(ValueError, match="at least one token"):
        await engine.score_tokens([])


async def test_score_tokens_are_raw_logprobs(engine: Engine, policy) -> None:
    tokens = [5, 9, 200, 31, 31, 8]
    assert await engine.score_tokens(tokens) == pytest.approx(learner_logprobs(policy[0], tokens), abs=2e-5)
    assert await engine.score_tokens([5]) == []


async def test_the_canary_covers_prefill_and_decode(engine: Engine, policy) -> None:
    prompts = [[256, 1, 2, 3, 4], [9]]
    for prompt, (tokens, logprobs) in zip(prompts, await engine.canary(prompts, 16), strict=True):
        assert tokens[: len(prompt)] == prompt and len(tokens) == len(prompt) + 16 == len(logprobs) + 1
        assert logprobs == pytest.approx(learner_logprobs(policy[0], tokens), abs=2e-5)
    with pytest.raises(ValueError, match="16 new do not fit"):
        await engine.canary([[1] * (CONTEXT - 15)], 16)


async def test_a_cancelled_call_leaves_nothing_behind(engine: VllmEngine) -> None:
    task = asyncio.ensure_future(engine.generate(requests(8), SamplingParams(max_tokens=90)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine._in_flight == 0
    assert len(await engine.generate(requests(2), SamplingParams(max_tokens=4))) == 2


async def test_what_vllm_refuses_is_one_line(policy) -> None:
    with pytest.raises(ValueError, match=r"^vLLM cannot run \S+ so: .*max_model_len.*$") as refusal:
        await VllmEngine.create(policy[2], EngineConfig(max_model_len=100_000))
    assert "\n" not in str(refusal.value)


FRONT = """
import asyncio, sys
from rollout.engine import EngineConfig
from rollout.vllm_engine import VllmEngine

async def main() -> None:
    await VllmEngine.create(sys.argv[1], EngineConfig(max_model_len=64, kv_cache_gib=0.05), cores=sys.argv[2])
    print("ready", flush=True)
    await asyncio.sleep(300)

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_an_engine_does_not_outlive_its_killed_parent(policy, tmp_path: Path) -> None:
    script = tmp_path / "front.py"
    script.write_text(FRONT)
    core = str(min(os.sched_getaffinity(0)))
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    front = subprocess.Popen(
        [sys.executable, str(script), str(policy[2]), core], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert front.stdout is not None and front.stdout.readline() == "ready\n"
        children = psutil.Process(front.pid).children(recursive=True)
        assert children
    finally:
        front.send_signal(signal.SIGKILL)
        front.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


async def test_a_dead_engine_process_says_so(engine: VllmEngine) -> None:
    """Last: it takes the module's engine with it."""
    running = asyncio.ensure_future(engine.generate(requests(8), SamplingParams(max_tokens=100)))
    await asyncio.sleep(0.05)
    children = psutil.Process().children(recursive=True)
    for child in [c for c in children if "EngineCore" in c.name() or "spawn_main" in " ".join(c.cmdline())]:
        child.kill()
    started = time.monotonic()
    with pytest.raises(EngineDied, match="process of this engine is gone"):
        await running
    assert time.monotonic() - started < 20
    with pytest.raises(EngineDied):
        await engine.generate(requests(1), SamplingParams(max_tokens=4))
    await engine.close()
    with pytest.raises(EngineDied, match="was closed"):
        await engine.score_tokens([1, 2])
