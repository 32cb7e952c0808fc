"""Weights from a learner into vLLM, attested; and each upstream bug, brought back, is seen to stop the run."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import torch

from pipelines.weight_sync import AttestationError, SharedMemoryTransport, WeightSender, attest_bytes, attest_meaning
from policy.checkpoint import save_model
from policy.config import ModelConfig
from policy.loading import load_policy
from policy.model import checkpoint_tensors
from policy.scorer import TokenScorer
from rollout.engine import EngineConfig, EngineDied, GenerateRequest
from rollout.types import SamplingParams, unpack_experts
from rollout.vllm_engine import VllmEngine
from rollout.vllm_routing import RoutingCapture
from rollout.vllm_start import MENDS

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONFIG = EngineConfig(max_model_len=96, kv_cache_gib=0.1, return_routed_experts=True)
CANARY = [[256, *range(40, 70)], [256, 80, 81, 82]]
# Four heads: the upstream rotary kernel is right for one. A wide initialisation: sharp distributions show small errors.
MODEL = ModelConfig(
    preset="tiny", overrides={"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.15}
)


@dataclass
class Learner:
    """The side that holds the truth."""

    model: Any
    tokenizer: Any
    folder: Path

    def perturb(self, part: str = "", seed: int = 0, scale: float = 0.05) -> int:
        """Adds noise to the parameters and buffers whose name contains ``part``; returns how many."""
        generator = torch.Generator().manual_seed(seed)
        changed = 0
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                if part in name:
                    tensor.add_(torch.randn(tensor.shape, generator=generator) * scale)
                    changed += 1
        return changed

    @torch.no_grad()
    def logprobs(self, tokens: list[int]) -> list[float]:
        ids = torch.tensor([tokens])
        found = self.model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        return found.gather(1, ids[0, 1:, None])[:, 0].tolist()

    async def attest(self, engine: VllmEngine, version: int = 0) -> tuple[float, float]:
        """What the driver does after an update: (mean, max) |Δlogp|."""
        answers = await engine.canary(CANARY, 16)
        mine = [x for tokens, _ in answers for x in self.logprobs(tokens)]
        names = [t for tokens, _ in answers for t in self.tokenizer.convert_ids_to_tokens(tokens[1:])]
        return attest_meaning([x for _, row in answers for x in row], mine, names, worker=0, version=version)


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Learner:
    model, tokenizer = load_policy(MODEL, seed=11)
    learner = Learner(model, tokenizer, tmp_path_factory.mktemp("model"))
    learner.perturb("e_score_correction_bias", scale=0.3)
    save_model(model, tokenizer, learner.folder)
    return learner


async def start(learner: Learner, mends: frozenset[str] = MENDS) -> VllmEngine:
    return await VllmEngine.create(learner.folder, CONFIG, cores=str(min(os.sched_getaffinity(0))), mends=mends)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(learner: Learner) -> AsyncIterator[VllmEngine]:
    engine = await start(learner)
    yield engine
    await engine.close()


@pytest.fixture
def sender(learner: Learner) -> Iterable[WeightSender]:
    sender = WeightSender(learner.model, run_id="test")
    yield sender
    sender.close()


async def sync(engine: VllmEngine, sender: WeightSender, version: int) -> None:
    update = sender.publish(version)
    attest_bytes(update, await engine.update_weights(update))


async def test_an_engine_agrees_with_the_folder_that_it_loaded(engine: VllmEngine, learner: Learner) -> None:
    mean, largest = await learner.attest(engine)
    assert mean < 2e-6 and largest < 2e-5  # far inside the tolerance


PARTS = ["embed_tokens", "layernorm", "q_proj", "kv_a", "kv_b_proj", "o_proj", "gate.weight", "e_score_correction_bias",
         "experts.gate_up_proj", "experts.down_proj", "shared_experts", "lm_head"]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
async def test_each_group_of_tensors_arrives(
    engine: VllmEngine, learner: Learner, sender: WeightSender, part: str
) -> None:
    version = PARTS.index(part)
    assert learner.perturb(part, seed=version)
    if part != "e_score_correction_bias":  # a small shift of the router may leave every choice as it was
        with pytest.raises(AttestationError):
            await learner.attest(engine)
    await sync(engine, sender, version)
    assert engine.policy_version == version
    await learner.attest(engine, version)


async def test_many_syncs_do_not_drift_and_completions_say_their_version(
    engine: VllmEngine, learner: Learner, sender: WeightSender
) -> None:
    request = GenerateRequest(prompt_token_ids=(1, 2, 3), sample_index=0, seed=1)
    for version in range(20, 26):
        learner.perturb(seed=version, scale=0.02)
        await sync(engine, sender, version)
        [completion] = await engine.generate([request], SamplingParams(max_tokens=4))
        assert completion.policy_version == version
    await learner.attest(engine)
    assert len(list(Path("/dev/shm").glob(f"r1-weights-test-{os.getpid()}-*"))) == 2


TIE = 1e-5  # a router whose choice is nearer to another one than this may choose either, in fp32


def routing_gap(learner: Learner, tokens: Sequence[int], experts: str | None) -> tuple[int, int, torch.Tensor]:
    """(choices compared, of them different, the engine's [T, layers, K]) of fed tokens, up to the first tie."""
    assert experts is not None
    ids, shape, width = unpack_experts(experts)
    assert shape == (len(tokens), 2, 2) and width == 1
    engines = torch.frombuffer(bytearray(ids), dtype=torch.uint8).view(shape).long()
    with torch.no_grad():
        out = learner.model.hidden_states(torch.tensor([list(tokens)]), segment_lengths=[len(tokens)])
    mine = torch.stack(out.routed_experts, dim=1)
    margins = TokenScorer(learner.model, chunk=64).router_margins([[*tokens, 0]])[0]
    end = next((i for i, margin in enumerate(margins) if margin < TIE), len(tokens))
    differ = engines[:end].sort(-1).values != mine[:end].sort(-1).values
    return differ.numel(), int(differ.sum()), engines


def asking(count: int) -> list[GenerateRequest]:
    """Requests of different lengths; every fifth asks for no experts."""
    draw = random.Random(count)
    return [
        GenerateRequest(prompt_token_ids=tuple(draw.randrange(256) for _ in range(draw.randrange(1, 40))),
                        sample_index=i, seed=i, routed_experts=i % 5 != 4)
        for i in range(count)
    ]  # fmt: skip


async def test_the_experts_of_prompts_and_sampled_tokens_are_the_learners(
    engine: VllmEngine, learner: Learner, sender: WeightSender
) -> None:
    """As many requests at once as make a mixed batch; and again after an update that moved the correction biases."""
    prompts = [[1], [7] * 40, list(range(90))]
    before: list[torch.Tensor] = []
    for version in (27, 28):
        await sync(engine, sender, version)
        compared = 0
        answers = await engine.generate(asking(30), SamplingParams(max_tokens=50))
        assert len({len(a.token_ids) for a in answers}) > 1
        for i, answer in enumerate(answers):
            if i % 5 == 4:
                assert answer.routed_experts is None
                continue
            fed = [*answer.prompt_token_ids, *answer.token_ids][:-1]
            count, different, _ = routing_gap(learner, fed, answer.routed_experts)
            assert different == 0
            compared += count
        assert compared > 30 * 24 * 4 // 2
        found = [routing_gap(learner, p, e) for p, e in zip(prompts, await engine.routed_experts(prompts), strict=True)]
        assert not any(different for _, different, _ in found)
        if before:
            assert any((a != b).any() for a, (_, _, b) in zip(before, found, strict=True))
        before = [experts for _, _, experts in found]
        learner.perturb("e_score_correction_bias", seed=version, scale=0.3)
    assert await engine._llm.collective_rpc("drop_routing", args=([],)) == [0]


async def test_experts_of_a_completion_that_a_stop_string_ends(engine: VllmEngine, learner: Learner, sender) -> None:
    """vLLM looks for it in another process than the model's: what was computed beyond is left out."""
    await sync(engine, sender, 29)
    asked = asking(4)[:1]
    [free] = await engine.generate(asked, SamplingParams(max_tokens=40))
    stop = next(free.text[i : i + 1] for i in range(4, len(free.text)) if free.text[i] not in free.text[:i])
    [cut] = await engine.generate(asked, SamplingParams(max_tokens=40, stop=(stop,)))
    assert len(cut.token_ids) < len(free.token_ids)
    count, different, _ = routing_gap(learner, [*cut.prompt_token_ids, *cut.token_ids][:-1], cut.routed_experts)
    assert count and different == 0


async def test_a_cancelled_call_leaves_no_experts_behind(engine: VllmEngine) -> None:
    task = asyncio.ensure_future(engine.generate(asking(16), SamplingParams(max_tokens=55)))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.generate(asking(3), SamplingParams(max_tokens=5))
    assert await engine._llm.collective_rpc("drop_routing", args=([],)) == [0]


async def test_a_model_without_routers_is_refused() -> None:
    dense = SimpleNamespace(get_model=lambda: torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"has no routers whose choice could be returned \(router.replay"):
        RoutingCapture.of(dense)


async def test_the_same_weights_sent_again_change_nothing(engine: VllmEngine, sender: WeightSender) -> None:
    asked = [GenerateRequest(prompt_token_ids=(5, 6, 7, 8), sample_index=i, seed=i) for i in range(4)]
    await sync(engine, sender, 30)
    before = await engine.generate(asked, SamplingParams(max_tokens=24))
    await sync(engine, sender, 31)
    after = await engine.generate(asked, SamplingParams(max_tokens=24))
    assert [replace(c, policy_version=30) for c in after] == before


async def test_one_flipped_byte_stops_the_run(engine: VllmEngine, learner: Learner, sender: WeightSender) -> None:
    update = sender.publish(40)
    with Path(update.payload["path"]).open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[len(view) // 2] ^= 0x40
    received = await engine.update_weights(update)
    with pytest.raises(AttestationError, match="version 40 arrived with other bytes"):
        attest_bytes(update, received)
    await sync(engine, sender, 41)
    await learner.attest(engine)


async def test_a_buffer_that_stays_behind_stops_the_run(engine: VllmEngine, learner: Learner) -> None:
    """The bytes are right, as far as they go; only the meaning shows it."""
    learner.perturb("e_score_correction_bias", seed=50, scale=1.0)
    tensors = [(n, t) for n, t in checkpoint_tensors(learner.model) if not n.endswith("e_score_correction_bias")]
    transport = SharedMemoryTransport(lambda: tensors, "without")
    update = transport.publish(50)
    attest_bytes(update, await engine.update_weights(update))
    transport.close()
    with pytest.raises(AttestationError, match=r"version 50 of the weights in rollout worker 0 .*worst: '.+' at \d+"):
        await learner.attest(engine, 50)
    sender = WeightSender(learner.model, run_id="test")
    await sync(engine, sender, 51)
    sender.close()
    await learner.attest(engine)


async def test_running_requests_are_refused_or_kept_by_choice(
    engine: VllmEngine, learner: Learner, sender: WeightSender
) -> None:
    asked = [GenerateRequest(prompt_token_ids=(9, 9, i), sample_index=i, seed=i, routed_experts=True) for i in range(6)]
    params = SamplingParams(max_tokens=80)
    alone = await engine.generate(asked, params)
    running = asyncio.ensure_future(engine.generate(asked, params))
    await asyncio.sleep(0.05)
    learner.perturb(seed=60, scale=0.02)
    update = sender.publish(60)
    with pytest.raises(ValueError, match=r"6 requests are running: .*keep_in_flight=True"):
        await engine.update_weights(update)
    attest_bytes(update, await engine.update_weights(update, keep_in_flight=True))
    begun_before = await running
    assert {c.policy_version for c in begun_before} == {alone[0].policy_version}
    assert engine.policy_version == 60
    assert begun_before != alone  # they went on with the new weights
    rows = [unpack_experts(c.routed_experts or "")[1][0] for c in begun_before]
    assert rows == [2 + len(c.token_ids) for c in begun_before]  # each token's row is of when it was computed
    await learner.attest(engine)


async def test_rollouts_asked_for_during_an_update_wait_for_it(engine: VllmEngine, sender: WeightSender) -> None:
    updating = asyncio.ensure_future(engine.update_weights(sender.publish(70)))
    await asyncio.sleep(0)
    request = GenerateRequest(prompt_token_ids=(1, 2), sample_index=0, seed=0)
    [completion] = await engine.generate([request], SamplingParams(max_tokens=2))
    assert completion.policy_version == 70
    await updating


async def test_an_update_by_another_backend_is_refused(engine: VllmEngine, sender: WeightSender) -> None:
    with pytest.raises(ValueError, match="came by 'nccl', this engine was started for 'shm'"):
        await engine.update_weights(replace(sender.publish(80), backend="nccl"))


async def test_a_sync_with_its_attestation_is_cheap(engine: VllmEngine, learner: Learner, sender: WeightSender) -> None:
    """Idle: about 0.1 s. The bound allows for a busy machine."""
    loop = asyncio.get_running_loop()
    seconds = []
    for version in range(90, 93):
        started = loop.time()
        await sync(engine, sender, version)
        await learner.attest(engine)
        seconds.append(loop.time() - started)
    assert min(seconds) < 1.5


async def test_without_the_rotary_mend_the_attestation_stops_the_run(learner: Learner, sender: WeightSender) -> None:
    engine = await start(learner, MENDS - {"rotary"})
    try:
        await sync(engine, sender, 100)  # the bytes are right
        with pytest.raises(AttestationError, match=r"version 100 .*\|Δlogp\| max .*; worst: '.+' at \d+ \(engine -"):
            await learner.attest(engine, 100)
        gone = sender.publish(101)
        sender.close()
        with pytest.raises(Exception, match="published two versions since"):
            await engine.update_weights(gone)
        with pytest.raises(EngineDied, match="the update to version 101 failed half-way"):
            await engine.score_tokens([1, 2, 3])
    finally:
        await engine.close()


async def test_without_the_expert_mend_the_attestation_stops_the_run(learner: Learner, sender: WeightSender) -> None:
    """And without the batch mend a completion depends on its company."""
    save_model(learner.model, learner.tokenizer, learner.folder)
    engine = await start(learner, MENDS - {"repack", "batch"})
    try:
        await learner.attest(engine)  # right as loaded
        asked = [GenerateRequest(prompt_token_ids=(i, 2, 3), sample_index=i, seed=i) for i in range(17)]
        together = await engine.generate(asked, SamplingParams(max_tokens=24))
        alone = [c for request in asked for c in await engine.generate([request], SamplingParams(max_tokens=24))]
        assert alone != together
        await sync(engine, sender, 110)  # the very same weights, the right bytes
        with pytest.raises(AttestationError, match=r"version 110 .*\|Δlogp\| max .*; worst: '.+' at \d+ \(engine -"):
            await learner.attest(engine, 110)
    finally:
        await engine.close()
