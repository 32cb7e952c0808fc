"""Which experts an engine sends each token to: captured on a CPU, read from vLLM's outputs on a GPU.

vLLM returns routed experts with model runner V2 alone, hence on GPUs. On a CPU every router takes a callback, which is
given the experts of a forward pass and not whose tokens they are; the model runner knows that at this moment. A
:class:`RoutingCapture` in the engine process puts both together, request by request.

The rows of a request are those of its tokens by position. A token that is computed again (its request was preempted)
replaces its row. Ids are the checkpoint's: vLLM calls the callback before it maps them to replicas.

Shapes: N tokens of a forward pass, T tokens of a request, L MoE layers, K experts of a token.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from rollout.types import pack_experts

ASKED = "experts-of:"
"""How the name of a request begins whose experts are kept."""

_log = logging.getLogger(__name__)
_TORN = -1  # in place of the rows that a request has: some of its tokens were never computed here
_FIRST_ROWS = 64  # room of a new request; doubled when it is full


class RoutingCapture:
    """Keeps the experts of the requests that ask for them until they are taken. Lives in the engine process.

    Args:
        runner: vLLM's model runner of a CPU.
        routers: of the MoE layers in their order; each has ``set_capture_fn``.
        experts: routed experts of a layer.
    """

    def __init__(self, runner: Any, routers: Sequence[Any], experts: int) -> None:
        self._runner, self._forward, self._layers = runner, runner._model_forward, len(routers)
        self._type = np.uint8 if experts <= 256 else np.uint16
        self._pass: dict[int, Tensor] = {}  # the experts of the running forward pass, by layer. [N, K]
        self._rows: dict[str, np.ndarray] = {}  # by request. [room, L, K]
        self._filled: dict[str, int] = {}
        for layer, router in enumerate(routers):
            router.set_capture_fn(partial(self._pass.__setitem__, layer))
        runner._model_forward = self._watched

    @classmethod
    def of(cls, runner: Any) -> RoutingCapture:
        """Watches every router of the runner's model.

        Raises:
            ValueError: the model has no router that vLLM lets watch.
        """
        from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

        found = [module for module in runner.get_model().modules() if isinstance(module, MoERunner)]
        found.sort(key=lambda module: module.layer_id)
        asked = [module.router for module in found if not module._quant_method.is_monolithic]
        routers = [router for router in asked if isinstance(router, BaseRouter)]
        if not found or len(routers) < len(found):
            raise ValueError(
                "this model has no routers whose choice could be returned (router.replay and "
                "engine.return_routed_experts need a mixture of experts): turn both off"
            )
        return cls(runner, routers, routers[0].global_num_experts)

    def take(self, asked: Sequence[tuple[str, int]]) -> list[str | None]:
        """The experts of finished requests as ``rollout.types.pack_experts`` writes them; they are not kept any longer.

        Args:
            asked: name of each request and how many of its tokens' rows are wanted. What was computed beyond (a token
                that was drawn and then dropped) is left out.

        Returns:
            One text per request; None where fewer rows are there than asked for, or rows between them are lacking.
        """
        texts: list[str | None] = []
        for name, count in asked:
            rows, filled = self._rows.pop(name, None), self._filled.pop(name, 0)
            texts.append(None if rows is None or filled < count else pack_rows(rows[:count]))
        return texts

    def drop(self, names: Sequence[str]) -> int:
        """Forgets requests that were given up; returns how many others are still kept."""
        for name in names:
            self._rows.pop(name, None)
            self._filled.pop(name, None)
        return len(self._rows)

    def _watched(self, *args: Any, **kwargs: Any) -> Any:
        """The model runner's forward pass, and afterwards what the routers chose in it."""
        self._pass.clear()
        out = self._forward(*args, **kwargs)
        self._file()
        return out

    def _file(self) -> None:
        assert len(self._pass) == self._layers, "a router was not asked in this forward pass"
        batch, count = self._runner.input_batch, self._runner.input_batch.num_reqs
        bounds = self._runner.query_start_loc.np[: count + 1]
        chosen: np.ndarray | None = None
        for index, request in enumerate(batch.req_ids[:count]):
            if not request.startswith(ASKED):
                continue
            if chosen is None:
                chosen = np.stack([self._pass[layer].numpy() for layer in range(self._layers)], axis=1)
            first = int(batch.num_computed_tokens_cpu[index])
            rows = chosen[bounds[index] : bounds[index + 1]]
            self._store(request.rpartition("-")[0], first, rows)  # vLLM adds a dash and eight characters to a name

    def _store(self, name: str, first: int, rows: np.ndarray) -> None:
        end, filled = first + len(rows), self._filled.get(name, 0)
        if first > filled:  # a cached prefix, say: what lies between would be whatever the memory held
            if filled != _TORN:
                _log.error(
                    "the experts of request %s are given up: its tokens %d to %d were not computed here (is the prefix "
                    "cache on?)", name, filled, first - 1,
                )  # fmt: skip
            self._rows.pop(name, None)
            self._filled[name] = _TORN
            return
        kept = self._rows.get(name)
        if kept is None or end > len(kept):
            room = max(_FIRST_ROWS, end if kept is None else 2 * end)
            wider = np.empty((room, *rows.shape[1:]), dtype=self._type)
            if kept is not None:
                wider[: len(kept)] = kept
            self._rows[name] = kept = wider
        kept[first:end] = rows
        self._filled[name] = end


def pack_rows(rows: np.ndarray) -> str:
    """Experts [T, L, K], uint8 or uint16, as text."""
    tokens, layers, top_k = rows.shape
    little = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<"))
    return pack_experts(little.tobytes(), (tokens, layers, top_k), rows.dtype.itemsize)


def returned_experts(output: Any, model_config: Any, count: int) -> str | None:
    """The experts in an output of vLLM on a GPU, as text; None where fewer rows are there than asked for.

    vLLM's rows [T, all layers, K] start with the prompt's first token and end before the last sampled one, in uint8 or
    uint16; layers without experts hold zeros and are left out here.

    Args:
        output: vLLM's ``CompletionOutput``.
        model_config: vLLM's, of a DeepSeek-V3 model.
        count: rows wanted.
    """
    rows, shape = output.routed_experts, model_config.hf_text_config
    if rows is None or len(rows) < count:
        return None
    every = getattr(shape, "moe_layer_freq", 1)
    layers = [i for i in range(shape.first_k_dense_replace, shape.num_hidden_layers) if i % every == 0]
    return pack_rows(rows[:count, layers])
