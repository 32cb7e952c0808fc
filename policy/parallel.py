"""Many ranks: one model, its gradients and its optimizer state over several processes.

Parameters are sharded over all ranks (PyTorch's FSDP2, ``fully_shard``): decoder layer by decoder layer they are
gathered when they are computed with, and let go of again. Under expert parallelism the routed experts are dealt out
over the ``expert`` dimension of a mesh [data, expert], tokens travel to them (``policy.expert_parallel``), and FSDP2
shards them over ``data`` alone.

Every rank is given the whole batch, packs it alike and computes its share. The shares of a loss add up, so gradients
are summed over the ranks and never averaged, and denominators need no communication.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from policy.batch import MicroBatch, Sample, cut, pack
from policy.config import ParallelConfig
from policy.expert_parallel import ExpertExchange
from policy.experts import Experts
from policy.layout import check_split, no_layers
from policy.lora import is_adapter

# A rank waits this long for the others; a rank that dies is noticed by who started it, long before.
_PATIENCE = timedelta(minutes=60)
# How much larger than an even share of the batch a micro-batch may get, so that no rank is left without one.
_SLACK = (1.0, 1.03, 1.07, 1.15, 1.3, 1.6)


def meeting_place(host: str, port: int, size: int, *, here: bool) -> Any:
    """Where ranks meet (a store over TCP); ``here`` opens it in this process, with port 0 on a free port."""
    kind: Any = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    return kind(host, port, size, is_master=here, wait_for_workers=False)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model. Of one rank alone every method is free.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        expert_parallel: ranks that share the routed experts.
        device: where this rank computes.
    """

    rank: int = 0
    size: int = 1
    expert_parallel: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def alone(cls) -> Ranks:
        """The only rank."""
        return cls()

    @classmethod
    def join(cls, config: ParallelConfig, rank: int, store: Any = None) -> Ranks:
        """Meets the other ranks, which all call this; on GPUs over NCCL, else over gloo.

        Args:
            config: how many there are.
            rank: of this process.
            store: where they meet (:func:`meeting_place`); needed for more than one.
        """
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        if config.ranks > 1:
            assert store is not None
            backend = "nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=config.ranks, timeout=_PATIENCE)
        return cls(rank, config.ranks, config.expert_parallel, device)

    def share(self, micros: Sequence[MicroBatch]) -> list[tuple[MicroBatch, float]]:
        """This rank's micro-batches, each with its weight; on every rank equally many.

        The ranks compute in step, so each round takes micro-batches of similar size, one for each rank. Who is left
        without one in the last round repeats the smallest with weight 0, to keep the collectives in step.
        """
        if self.size == 1:
            return [(micro, 1.0) for micro in micros]
        by_size = sorted(range(len(micros)), key=lambda i: -micros[i].tokens)
        own = []
        for first in range(0, len(by_size), self.size):
            dealt = by_size[first : first + self.size]
            place = self.rank if (first // self.size) % 2 == 0 else self.size - 1 - self.rank
            own.append((micros[dealt[place]], 1.0) if place < len(dealt) else (micros[by_size[-1]], 0.0))
        return own

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in fp64; the same bits on every rank, because all of them add in the order of ranks."""
        values = values.double()
        return values if self.size == 1 else torch.stack(self.from_all(values)).sum(dim=0)

    def largest(self, values: Tensor) -> Tensor:
        """Maximum over the ranks; a NaN on any of them wins."""
        return values if self.size == 1 else torch.stack(self.from_all(values)).amax(dim=0)

    def from_all(self, values: Tensor) -> list[Tensor]:
        """Every rank's values, rank 0's first; all ranks call this."""
        found = values.detach().to(self.device).contiguous()
        parts = [torch.empty_like(found) for _ in range(self.size)]
        dist.all_gather(parts, found)
        return [part.to(values.device) for part in parts]


def pack_for(
    ranks: Ranks, samples: Sequence[Sample], micro_batch_tokens: int, *, padded: bool = False
) -> list[MicroBatch]:
    """``pack``, into micro-batches so small that all ranks have work and rounds are full, as far as that can be.

    The same on every rank. ``micro_batch_tokens`` stays the limit.
    """
    limit = micro_batch_tokens
    if ranks.size > 1 and samples:
        sizes = [len(sample.token_ids) - 1 for sample in samples]
        places = math.ceil(len(cut(sizes, limit, padded=padded)) / ranks.size) * ranks.size
        smaller = (min(limit, math.ceil(slack * sum(sizes) / places)) for slack in _SLACK)
        limit = next((one for one in smaller if len(cut(sizes, one, padded=padded)) <= places), limit)
    return pack(samples, limit, padded=padded)


class Sharded(nn.Module):
    """What FSDP2 takes for the root of a sharded model. Its forward is whatever is computed with the weights.

    FSDP2 gathers parameters around ``forward`` only, and what the learner computes (hidden states, then the head a
    chunk at a time) is nobody's forward. The link from the model to this object is no submodule: names stay as they
    are.

    Attributes:
        model: the model, with DTensors for parameters.
        ranks: over which it is sharded.
        dtype: in which it computes (its parameters are fp32 masters when that is bf16).
        dtypes: in which each parameter is computed with, by name; adapters' differ from the model's.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks, skeleton: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.ranks, self.dtype = model, ranks, model.dtype
        self.dtypes = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}
        self._skeleton = (skeleton,)  # the model without its weights; in a tuple: no submodule either

    def forward(self, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)

    def frozen_copy(self) -> PreTrainedModel:
        """Another model with these weights, sharded alike, that does not train."""
        twin = copy.deepcopy(self._skeleton[0]).requires_grad_(False)
        shard(twin, self.ranks, _Gathered(twin, self.model).fill)
        for (_, mine), (_, its) in zip(self.model.named_buffers(), twin.named_buffers(), strict=True):
            its.copy_(mine)
        return twin.eval()


def sharded(model: nn.Module) -> Sharded | None:
    """What :func:`shard` made of a model; None for a model that is whole."""
    return model.__dict__.get("_sharded")


def shard(model: PreTrainedModel, ranks: Ranks, fill: Callable[[nn.Module], None] = lambda part: None) -> None:
    """Shards a model in place; every rank holds the same model before. One rank leaves it whole.

    A model in bf16 keeps fp32 masters of what it trains and computes in bf16; gradients are added up in fp32.

    Args:
        model: what to shard.
        ranks: over which.
        fill: gives a part of the model its weights, where it has none yet: called for each layer before that is cut
            and its whole weights are let go, and for the model in the end.

    Raises:
        ValueError: expert parallelism of a model without routed experts, or whose experts cannot be dealt out; ranks
            that hold different weights.
    """
    if ranks.size == 1:
        return fill(model)
    _check(model, ranks)
    same = _SameWeights(ranks)
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    root = Sharded(model, ranks, copy.deepcopy(model, memo))
    half = model.dtype in (torch.bfloat16, torch.float16)
    precision = MixedPrecisionPolicy(
        param_dtype=model.dtype if half else None, reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )  # fmt: skip
    kind, width = ranks.device.type, ranks.expert_parallel
    shape = (ranks.size // width, width)
    grid = init_device_mesh(kind, shape, mesh_dim_names=("data", "expert")) if width > 1 else None
    line = init_device_mesh(kind, (ranks.size,), mesh_dim_names=("ranks",))
    for layer in _layers(model):
        fill(layer)
        same.look(layer)
        wide = _in_fp32(layer) if half else []
        _widen(layer, precision.param_dtype)
        for module in layer.modules():
            if grid is not None and isinstance(module, Experts):
                _deal_out(module, grid["expert"])
                _fully_shard(module, grid["data"], precision)
        if wide:  # adapters: trained and computed with in fp32, whatever the model's dtype
            _fully_shard(wide, line, MixedPrecisionPolicy(cast_forward_inputs=False))
        _fully_shard(layer, line, precision)
    fill(model)
    same.look(model)
    same.check(type(model).__name__)
    _widen(root, precision.param_dtype)
    _fully_shard(root, line, precision)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the shares of a loss add up: a sum, not a mean
            module.set_force_sum_reduction_for_comms(True)
    object.__setattr__(model, "_sharded", root)


def within(model: nn.Module, call: Callable[..., Any], *args: Any) -> Any:
    """``call(*args)``, which computes with the model's weights: gathered as they are needed when the model is sharded.

    Tensors with a gradient must be in what it returns: itself, in a tuple or in a dataclass. While gradients are
    enabled a backward must follow: until then the root's parameters stay gathered.
    """
    root = sharded(model)
    if root is None:
        return call(*args)
    out = root(call, *args)
    if not torch.is_grad_enabled():
        cast(FSDPModule, root).reshard()  # no backward will, and a stale copy must not outlive the next update
    return out


class WholeTensors(Mapping[str, Tensor]):
    """``state_dict`` of a sharded model whose tensors are gathered when they are asked for, and not kept.

    All ranks must ask for the same names in the same order. Each is in the dtype in which the model computes with it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        root = sharded(model)
        assert root is not None
        self._state, self._dtypes = model.state_dict(), root.dtypes

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name].detach()
        return whole(tensor.to(self._dtypes.get(name, tensor.dtype)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


class Outlines(Mapping[str, Tensor]):
    """``state_dict`` of any model, shapes and dtypes only (tensors on the ``meta`` device); nothing is gathered."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._state, root = model.state_dict(), sharded(model)
        self._dtypes = {} if root is None else root.dtypes

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        return torch.empty(tensor.shape, dtype=self._dtypes.get(name, tensor.dtype), device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all ranks, which ask for it together; one that is not sharded as it is."""
    return cast(DTensor, tensor).full_tensor() if isinstance(tensor, DTensor) else tensor


def by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups parameters by the mesh over which they are sharded: fused operations take tensors of one mesh only."""
    groups: dict[Any, list[Tensor]] = {}
    parameters = list(parameters)
    assert len({isinstance(parameter, DTensor) for parameter in parameters}) <= 1, "some are gathered: reshard first"
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


class _SameWeights:
    """Sees that all ranks hold the same weights before they are cut: of different ones each would keep its own part."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._digest = ranks, xxhash.xxh3_128()

    @torch.no_grad()
    def look(self, part: nn.Module) -> None:
        """At what is whole in a part of the model."""
        for tensor in (*part.parameters(), *part.buffers()):
            if not isinstance(tensor, DTensor) and tensor.numel():
                plain: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                self._digest.update(plain)

    def check(self, name: str) -> None:
        """All ranks call this.

        Raises:
            ValueError: they do not hold the same.
        """
        own = torch.frombuffer(bytearray(self._digest.digest()), dtype=torch.uint8)
        first, *others = self._ranks.from_all(own)
        if different := [rank for rank, found in enumerate(others, start=1) if not torch.equal(found, first)]:
            raise ValueError(
                f"learner rank {different[0]} holds other weights of {name} than rank 0, and each would keep its part "
                "of its own: make model.path the same folder on every machine"
            )


class _Gathered:
    """Gives parameters on the meta device the values of another model's of the same modules, which is sharded."""

    def __init__(self, model: nn.Module, source: nn.Module) -> None:
        self._sources = dict(zip(model.modules(), source.modules(), strict=True))
        self._made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # one for all modules that share a parameter

    @torch.no_grad()
    def fill(self, part: nn.Module) -> None:
        """Of every module below ``part``; all ranks ask together."""
        for module in part.modules():
            for name, empty in list(module.named_parameters(recurse=False)):
                if empty.is_meta and not isinstance(empty, DTensor):
                    if id(empty) not in self._made:
                        value = whole(self._sources[module].get_parameter(name)).to(empty.dtype)
                        self._made[id(empty)] = empty, nn.Parameter(value.clone(), empty.requires_grad)
                    setattr(module, name, self._made[id(empty)][1])


def _widen(module: nn.Module, half: torch.dtype | None) -> None:
    """Parameters in half precision become their fp32 masters (before they are cut, and a layer at a time)."""
    for parameter in module.parameters():
        if parameter.dtype == half and parameter.requires_grad:
            parameter.data = parameter.data.float()


def _in_fp32(layer: nn.Module) -> list[nn.Module]:
    """Modules of a layer in half precision whose own parameters are not."""
    own = {module: list(module.parameters(recurse=False)) for module in layer.modules()}
    return [module for module, found in own.items() if found and all(p.dtype == torch.float32 for p in found)]


def _fully_shard(module: nn.Module | list[nn.Module], mesh: DeviceMesh, precision: MixedPrecisionPolicy) -> None:
    fully_shard(module, mesh=mesh, mp_policy=precision, shard_placement_fn=partial(_cut, mesh.size()))


def _cut(parts: int, parameter: nn.Parameter) -> Shard | None:
    """Along which dimension a parameter is cut: the first (None), unless expert parallelism cuts that one already."""
    if isinstance(parameter, DTensor) and parameter.shape[1] % parts == 0:
        return Shard(1)
    return None


def _deal_out(experts: Experts, mesh: DeviceMesh) -> None:
    """Leaves this rank its experts, and gives them the way for tokens to come and go."""
    for name, parameter in list(experts.named_parameters()):
        own = parameter.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
        part = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
        setattr(experts, name, nn.Parameter(part, parameter.requires_grad))
    experts.exchange = ExpertExchange(mesh.get_group())


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers; of layers within layers (Mamba's) the outer ones."""
    names = set(model._no_split_modules or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    inside = {part for module in found for part in module.modules() if part is not module}
    return [module for module in found if module not in inside]


def _check(model: PreTrainedModel, ranks: Ranks) -> None:
    name = type(model).__name__
    counts = [module.count for module in model.modules() if isinstance(module, Experts)]
    adapted = any(is_adapter(n) and ".experts." in n for n, _ in model.named_parameters())
    layout = ParallelConfig(ranks=ranks.size, expert_parallel=ranks.expert_parallel)
    if not _layers(model):
        raise no_layers(name, layout)
    check_split(name, counts[0] if counts else 0, layout, adapted=adapted)
