"""What each rank of ``test_learner_ranks`` computes. Its results go to a file; everything is tiny and in fp64."""

from __future__ import annotations

import ctypes
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from pipelines.weight_sync import SentTensors, sender
from policy.batch import Sample
from policy.config import LearnerConfig, LoraConfig, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from policy.learner import Learner
from policy.loading import open_policy
from policy.lora import add_adapters
from policy.loss import Denominators
from policy.model import PolicyModel, checkpoint_tensors
from policy.optimizer import PolicyOptimizer
from policy.parallel import Ranks, shard
from policy.presets import preset_config
from policy.scorer import reference_policy
from policy.shards import Shards

SMALL = {
    "hidden_size": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "num_hidden_layers": 3, "first_k_dense_replace": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "initializer_range": 0.1,
}  # fmt: skip
LARGE = {**SMALL, "hidden_size": 512, "num_hidden_layers": 20, "moe_intermediate_size": 256, "intermediate_size": 2048}
# (samples, mini-batches) of the five steps: ragged, fewer samples than ranks, several mini-batches
STEPS = ((12, 1), (2, 1), (12, 3), (1, 1), (9, 2))
OF_THE_CUT = ("learner/tokens_per_s", "learner/pack_fill")  # metrics that the number of ranks may change
SEQUENCES = ([9, 10, 11, 12], [20, 30, 40], [50, 60])


def policy(dtype: torch.dtype = torch.float64, **overrides: Any) -> PolicyModel:
    torch.manual_seed(0)
    return PolicyModel(preset_config("tiny", **{**SMALL, **overrides})).to(dtype)  # pyright: ignore[reportArgumentType]


def dense(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Not ours, with tied embeddings."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(dtype)  # pyright: ignore[reportArgumentType]


def adapted(dtype: torch.dtype = torch.float64, *, experts: bool = False) -> PreTrainedModel:
    model = policy(dtype)
    add_adapters(model, LoraConfig(rank=4, experts=experts), seed=0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "policy": policy,
    "dense": dense,
    "lora": adapted,
    "lora-experts": lambda: adapted(experts=True),
    "bf16": lambda: policy(torch.bfloat16),
    "bf16-lora": lambda: adapted(torch.bfloat16),
}


def batch(count: int, seed: int) -> list[Sample]:
    draw = random.Random(seed)
    samples = []
    for _ in range(count):
        prompt, completion = draw.randint(1, 6), draw.randint(1, 12)
        samples.append(
            Sample(
                token_ids=tuple(draw.randrange(9, 320) for _ in range(prompt + completion)),
                prompt_length=prompt,
                rollout_logprobs=tuple(-5.8 + draw.gauss(0, 0.3) for _ in range(completion)),
                advantage=draw.gauss(0, 1),
            )
        )
    return samples


def learner(model: PreTrainedModel, ranks: Ranks, micro_batch_tokens: int, recompute: str = "none") -> Learner:
    """Clips every step, and holds on to the first weights."""
    config = LearnerConfig(micro_batch_tokens=micro_batch_tokens, activation_checkpointing=recompute, threads=1)
    return Learner(
        model,
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, max_grad_norm=0.05),
        loss=LossConfig(kl_coef=0.1, aggregation="sequence"),
        config=config,
        total_steps=20,
        reference=reference_policy(model),
        ranks=ranks,
    )


def train(
    ranks: Ranks, kind: str = "policy", steps: tuple[tuple[int, int], ...] = STEPS, *, recompute: str = "none"
) -> dict[str, Any]:
    """Loss and gradients before, metrics of each step, weights and everything else after."""
    model = MODELS[kind]()
    shard(model, ranks)
    # In bf16 each sequence alone: how they are packed changes the last bits of bf16 sums.
    one = learner(model, ranks, 1 if kind.startswith("bf16") else 40, recompute)
    loss, gradients = one.gradients(batch(12, seed=0))
    metrics = [one.step(batch(n, seed), mini_batches=parts) for seed, (n, parts) in enumerate(steps)]
    metrics.append(one.sft_step(batch(5, seed=9)))
    later, _ = one.gradients(batch(12, seed=0))
    return {
        "losses": [loss, later],
        "gradients": gradients,
        "metrics": [{k: v for k, v in row.items() if k not in OF_THE_CUT} for row in metrics],
        "weights": {name: tensor.clone() for name, tensor in checkpoint_tensors(model)},
        "logprobs": one.sequence_logprobs(SEQUENCES),
        "margins": one._scorer.router_margins(SEQUENCES),
    }


def published(ranks: Ranks, kind: str) -> str | None:
    """Checksum of the bytes that reach shared memory, on the first rank."""
    model = MODELS[kind]()
    shard(model, ranks)
    dtype = "bfloat16" if kind.startswith("bf16") else "float64"
    sends = sender(model, backend="shm", dtype=dtype, run_id=f"ranks-{ranks.size}", receivers=1)
    update = sends.publish(1)
    sends.close()
    return None if update is None else update.checksum


@contextmanager
def mean_of_gradients() -> Iterator[None]:
    """The default of FSDP2, under which a gradient depends on the number of ranks."""
    with mock.patch.object(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None):
        yield


@contextmanager
def denominators_of_the_share() -> Iterator[None]:
    """Each rank divides by its own tokens and sequences instead of the mini-batch's."""
    size, of = dist.get_world_size(), Denominators.of

    def own(micros: Any, *args: Any) -> Denominators:
        return of(micros[dist.get_rank() :: size] or micros[:1], *args)

    with mock.patch("policy.learner.Denominators.of", own):
        yield


@contextmanager
def local_clipping() -> Iterator[None]:
    """Each rank clips by the norm of its own shards."""

    def norm(self: PolicyOptimizer, gradients: list[torch.Tensor]) -> float:
        return float(torch.stack([torch.linalg.vector_norm(g) for g in gradients]).norm())

    with mock.patch.object(PolicyOptimizer, "_norm", norm):
        yield


FAULTS = {"mean": mean_of_gradients, "denominators": denominators_of_the_share, "clipping": local_clipping}


def memory(ranks: Ranks) -> dict[str, float]:
    """MB: the whole model, its largest tensor, and by how much this process grew while the weights went by.

    ``kept`` is the same of a sync that keeps all that it gathers.
    """
    model = policy(torch.float32, **LARGE)
    shard(model, ranks)
    tensors = SentTensors(model, "float32")
    found = {"whole": float(sum(t.numel() * t.element_size() for _, t in tensors.outlines()))}
    found["largest"] = float(max(p.numel() * p.element_size() for p in model.parameters()))
    with peak_growth() as grown:
        for _ in tensors():
            pass
    found["streamed"] = float(grown[0])
    with peak_growth() as grown:
        _ = list(tensors())
    found["kept"] = float(grown[0])
    return {name: size / 1e6 for name, size in found.items()}


def loading(ranks: Ranks, folder: Path) -> dict[str, float]:
    """MB that this process took at most to load a model and shard it: a layer at a time, and whole first.

    ``wrong``: tensors of either, and of a model with adapters, that are not the folder's.
    """
    found, wrong = {}, 0
    for name, lora in (("by layer", None), ("adapted", LoraConfig(rank=4)), ("whole", None)):
        with peak_growth() as grown:
            opened = open_policy(ModelConfig(path=str(folder), lora=lora), seed=0)
            if name == "whole":
                opened.fill(opened.model)
            shard(opened.model, ranks, opened.fill)
            opened.close()
        found[name] = grown[0] / 1e6
        with Shards(folder) as stored:
            sent = dict(SentTensors(opened.model, "float32")())
            assert sent.keys() == stored.keys()
            wrong += sum(not torch.equal(tensor, stored.read(key)) for key, tensor in sent.items())
        del opened, sent
        gc.collect()
    return {**found, "wrong": wrong}


def different(ranks: Ranks) -> str:
    """What a rank is told whose model is not the others'."""
    model = policy()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.shared_experts.up_proj.weight")[3, 4] += ranks.rank
    try:
        shard(model, ranks)
    except ValueError as error:
        return str(error)
    return ""


@contextmanager
def peak_growth() -> Iterator[list[int]]:
    """How many bytes of its own this process held at most beyond what it holds now, looked at every millisecond."""

    def held() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    # What earlier work freed and this process keeps for the next (``policy.allocator``) would hide what is taken now.
    ctypes.CDLL(None).malloc_trim(0)
    start, grown, ended = held(), [0], threading.Event()

    def look() -> None:
        while not ended.is_set():
            grown[0] = max(grown[0], held() - start)
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield grown
    finally:
        ended.set()
        thread.join()


def work(rank: int, size: int, folder: str) -> None:
    """Everything that ``size`` ranks compute, in one set of processes; rank 0 writes it down."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store-{size}", size)  # pyright: ignore[reportPrivateImportUsage]
    Ranks.join(ParallelConfig(ranks=size), rank, store)
    from tests.integration.support.spoilt_ranks import spoilt

    found: dict[str, Any] = {"spoilt": spoilt(Ranks(rank, size))}
    for width in (1, 2):
        ranks = Ranks(rank, size, width)
        found[f"policy x{width}"] = train(ranks)
        found[f"bytes x{width}"] = published(ranks, "policy")
    if size == 2:
        both = Ranks(rank, size)
        for kind in ("dense", "lora", "lora-experts", "bf16", "bf16-lora"):
            found[kind] = train(both, kind, STEPS[:1])
            found[f"bytes {kind}"] = published(both, kind)
        for name, fault in FAULTS.items():
            with fault():
                found[f"fault {name}"] = train(both, steps=STEPS[:1])
        for width in (1, 2):
            found[f"recomputed x{width}"] = train(Ranks(rank, size, width), steps=STEPS[:1], recompute="layer")
        found["memory"], found["loading"] = memory(both), loading(both, Path(folder) / "large")
    found["different"] = different(Ranks(rank, size))
    kept = found if rank == 0 else {name: found.get(name) for name in ("memory", "loading", "different")}
    torch.save(kept, f"{folder}/{size}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
