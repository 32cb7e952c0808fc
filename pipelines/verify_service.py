"""A learner that can be measured: what ``r1 verify`` asks beside what a run asks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines.learner_service import LearnerService
from policy.config import LearnerConfig, ParallelConfig
from rollout.types import Completion, Problem, Rollout, RolloutGroup

if TYPE_CHECKING:
    from policy.batch import Sample
    from policy.invariance import Outcome

_SMALLEST, _SPREAD = 0.002, 0.03  # by how much a tensor is changed, relative to itself
_BIAS_WAVE = 0.02  # and a buffer, which may be zero


class VerifyService(LearnerService):
    """The learner of a run whose state can be read bit by bit and changed on purpose."""

    reference: Any = None

    def start_over(self) -> None:
        """Loads the recipe's model as a new process would; nothing of an earlier learner is left."""
        self.close()
        self._drop_learner()
        self.model = self.tokenizer = self.saver = None
        self.load()

    def seed_everything(self, seed: int) -> None:
        """Sets the random numbers of this process."""
        import torch

        torch.manual_seed(seed)

    def digests(self) -> dict[str, str]:
        """A digest of every tensor and number of the complete state: weights, buffers, moments, counters, RNG.

        Of a sharded model every rank's parts.
        """
        import torch.distributed as dist

        state = {"model": self.model.state_dict(), "learner": self.learner.state_dict()}
        own = {name: _digest(value) for name, value in _leaves(state)}
        if self.ranks.size == 1:
            return own
        parts: list[Any] = [None] * self.ranks.size
        dist.all_gather_object(parts, own)
        return {f"rank {rank}: {name}": value for rank, part in enumerate(parts) for name, value in part.items()}

    def load_for_measuring(self, dtype: str, *, reference: bool) -> None:
        """The recipe's model in another dtype, and a reference policy when one is asked for; sharded alike."""
        import torch

        from policy.guards import check_loaded
        from policy.invariance import measured_model, nearby_reference
        from policy.loading import load_policy

        model, self.tokenizer = load_policy(self.config, self.seed)
        check_loaded(model, str(self.config.path or self.config.preset))
        self.model = measured_model(model, getattr(torch, dtype))
        self.reference = nearby_reference(self.model, self.seed) if reference else None
        for each in (self.model, self.reference):
            if each is not None:
                self._place(each)

    def outcome(self, bench: dict[str, Any], samples: Sequence[Sample]) -> Outcome | None:
        """Loss and gradient of the samples by all ranks together; rank 0 has the answer.

        Args:
            bench: fields of ``policy.invariance.Bench`` beside model, reference and ranks.
            samples: the whole batch.
        """
        from policy.invariance import Bench

        config = replace(bench["config"], threads=self.threads)
        found = Bench(
            model=self.model, reference=self.reference, ranks=self.ranks, **{**bench, "config": config}
        ).outcome(samples)
        return found if self.rank == 0 else None

    def regroup(self, parallel: ParallelConfig) -> None:
        """Another layout of the same processes, for the next model that is loaded."""
        assert parallel.ranks == self.ranks.size
        self.model = self.reference = None
        self.parallel, self.ranks = parallel, replace(self.ranks, expert_parallel=parallel.expert_parallel)

    def routing_agreement(self, completions: Sequence[Completion]) -> dict[int, float]:
        """By MoE layer: share of the engine's choices of experts that the learner's router makes too.

        Each layer is asked on what the layers before it compute with the engine's experts.

        Args:
            completions: with ``routed_experts``.
        """
        import torch

        from policy.batch import pack, samples_from_groups
        from policy.scorer import TokenScorer

        rollouts = tuple(Rollout(completion=completion, advantage=0.0) for completion in completions)
        groups = [RolloutGroup(problem=Problem(id="verify", prompt=""), rollouts=rollouts)]
        samples = samples_from_groups(groups, mask_truncated=False)
        scorer = TokenScorer(self.model, chunk=LearnerConfig().logprob_chunk, replay=True)
        total = None
        for micro in pack(samples, LearnerConfig().micro_batch_tokens):
            with torch.no_grad():
                found = scorer(micro.to(scorer.device), 1.0).router
            assert found is not None
            total = found if total is None else total + found
        assert total is not None and total.agreed is not None
        sent, config = total.load.sum(dim=1), self.model.config
        first = config.num_hidden_layers - len(sent)
        return {first + i: share for i, share in enumerate((total.agreed / sent).tolist())}

    def change_all(self) -> None:
        """Changes every tensor of the model by a few per cent, each by another share, and every saved buffer."""
        import torch

        with torch.no_grad():
            for index, (name, tensor) in enumerate(self.model.state_dict().items()):
                if name.endswith("e_score_correction_bias"):
                    wave = torch.arange(len(tensor), dtype=torch.float32, device=tensor.device)
                    tensor.add_(_BIAS_WAVE * torch.sin(wave))
                elif tensor.is_floating_point():
                    tensor.mul_(1 + _SMALLEST + _SPREAD * math.sin(index) ** 2)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from _leaves(child, f"{path}.{index}")
    else:
        yield path, value


def _digest(value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return repr(value)
    local = getattr(value, "to_local", None)  # a shard
    if local is not None:
        value = local()
    parts = getattr(value, "__tensor_flatten__", None)  # 8-bit moments: several tensors in one
    if parts is not None:
        return "/".join(_digest(getattr(value, name)) for name in parts()[0])
    whole = value.detach().cpu().contiguous()
    data = whole.reshape(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
