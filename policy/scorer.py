"""Log-probabilities of a micro-batch under any causal language model.

Shapes: N packed input tokens, M of them under the loss, S sequences, L the longest, H hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policy.batch import MicroBatch, Sample, pack
from policy.logprobs import token_logprobs
from policy.lora import adapters_off, has_adapters, reference
from policy.model import PolicyModel
from policy.moe import Router
from policy.parallel import sharded, within
from policy.routing import RouterCounts

# Fields of transformers' configs that change the logits after the head, unless they are null or 1.
_CHANGES_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a model says about the tokens under the loss of one micro-batch.

    Attributes:
        logprobs: log-probability of each target, nats, with gradient. [M]
        entropy: of the distribution each target was drawn from, nats, without gradient. [M]
        router: what the routers did with the micro-batch; None for a model without our MoE layers.
        balance: balance loss of the micro-batch's sequences, summed over sequences and layers, with gradient; None
            when it was not asked for. 0-d, float64
    """

    logprobs: Tensor
    entropy: Tensor
    router: RouterCounts | None
    balance: Tensor | None = None


class TokenScorer:
    """A model and how its head is computed; calling it scores a micro-batch.

    A ``PolicyModel`` runs on the packed tokens. Any other transformers causal LM runs on a padded batch, and its hidden
    states are packed afterwards; from there the path is the same. Only hidden states that predict a token under the
    loss pass the LM head.

    Args:
        model: the policy or the reference. Put into eval mode: the sampler has no dropout either.
        chunk: tokens whose logits exist at once.
        fp32_head: compute the LM head in fp32.
        adapters: False scores what the model is without its adapters.
        replay: route the tokens of a micro-batch that carries ``routed_experts`` to these, not where the router would.

    Raises:
        ValueError: the model has no linear LM head on top of its hidden states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        chunk: int,
        fp32_head: bool = False,
        replay: bool = False,
        adapters: bool = True,
    ) -> None:
        self.model = model.eval()
        assert adapters or has_adapters(model)
        self._replay, self._adapters = replay, adapters
        self._chunk = chunk
        self._fp32_head = fp32_head
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or model.base_model is model:
            raise ValueError(
                f"{type(model).__name__} is not a causal language model with a linear head: load one with "
                "AutoModelForCausalLM"
            )
        self._head = head
        if not isinstance(model, PolicyModel):
            with torch.no_grad():
                within(model, self._check_head)

    @property
    def pads(self) -> bool:
        """Whether a micro-batch is computed padded to its longest sequence."""
        return not isinstance(self.model, PolicyModel)

    @property
    def device(self) -> torch.device:
        """Where micro-batches are computed."""
        return self._head.weight.device

    def __call__(self, micro: MicroBatch, temperature: float, *, balance: bool = False) -> TokenScores:
        """Scores the tokens under the loss at ``temperature`` (> 0). ``micro`` lies on ``device``.

        Args:
            micro: what to score.
            temperature: the distributions' temperature.
            balance: compute the balance loss of the routers too.
        """
        with nullcontext() if self._adapters else adapters_off(self.model):
            return within(self.model, self._score, micro, temperature, balance)

    def _score(self, micro: MicroBatch, temperature: float, balance: bool) -> TokenScores:
        hidden, router, balance_sum = self._hidden(micro, balance=balance)
        logprobs, entropy = token_logprobs(
            hidden.index_select(0, micro.loss_index),
            self._head.weight,
            micro.targets,
            chunk=self._chunk,
            temperature=temperature,
            fp32=self._fp32_head,
            head_bias=self._head.bias,
        )
        return TokenScores(logprobs, entropy, router, balance_sum)

    @torch.no_grad()
    def sequence_logprobs(
        self, sequences: Sequence[Sequence[int]], temperature: float = 1.0, micro_batch_tokens: int = 8192
    ) -> list[list[float]]:
        """Log-probability (nats) of each token but the first, given those before it. S x [T] -> S x [T - 1]

        Raises:
            ValueError: a sequence of fewer than two tokens.
        """
        found: list[list[float]] = [[] for _ in sequences]
        samples = [Sample(token_ids=tuple(tokens), prompt_length=1) for tokens in sequences]
        for micro in pack(samples, micro_batch_tokens, padded=self.pads):
            logprobs = self(micro.to(self.device), temperature).logprobs
            for index, part in zip(micro.sample_index, logprobs.split(micro.segment_lengths), strict=True):
                found[index] = part.tolist()
        return found

    @torch.no_grad()
    def router_margins(self, sequences: Sequence[Sequence[int]], micro_batch_tokens: int = 8192) -> list[list[float]]:
        """How near to a tie the routing of each token but the last is, in any layer. S x [T] -> S x [T - 1]

        See ``Router.margin``; infinite for a model without our router.
        """
        found: list[list[float]] = [[] for _ in sequences]
        routers = [module for module in self.model.modules() if isinstance(module, Router)]
        samples = [Sample(token_ids=tuple(tokens), prompt_length=1) for tokens in sequences]
        for micro in pack(samples, micro_batch_tokens, padded=self.pads):
            least = [torch.full((micro.tokens,), float("inf"), device=self.device)]

            def look(router: Router, arguments: tuple[Tensor, ...], least: list[Tensor] = least) -> None:
                least[0] = least[0].minimum(router.margin(arguments[0]).float())

            hooks = [router.register_forward_pre_hook(look) for router in routers]
            try:
                # packed longest first, which is the order of the model's stream too
                within(self.model, self._hidden, micro.to(self.device))
            finally:
                for hook in hooks:
                    hook.remove()
            for index, part in zip(micro.sample_index, least[0].split(micro.segment_lengths), strict=True):
                found[index] = part.tolist()
        return found

    def _hidden(self, micro: MicroBatch, *, balance: bool = False) -> tuple[Tensor, RouterCounts | None, Tensor | None]:
        """Hidden states [N, H] after the last norm, what the routers did, and their balance loss if asked for."""
        if isinstance(self.model, PolicyModel):
            given = micro.routed_experts if self._replay else None
            out = self.model.hidden_states(
                micro.input_ids, position_ids=micro.position_ids, segment_lengths=micro.segment_lengths,
                routed_experts=None if given is None else list(given), balance=balance,
            )  # fmt: skip
            if not out.router_reports:
                return out.hidden, None, None
            losses = [report.balance for report in out.router_reports if report.balance is not None]
            counts = RouterCounts.of(out.router_reports, list(out.router_load))
            return out.hidden, counts, torch.stack(losses).double().sum() if losses else None
        rows, longest = len(micro.segment_lengths), max(micro.segment_lengths)
        lengths = torch.tensor(micro.segment_lengths, device=self.device)
        slots = (torch.arange(longest, device=self.device) < lengths[:, None]).flatten().nonzero().squeeze(1)
        padded = micro.input_ids.new_zeros(rows * longest).index_copy_(0, slots, micro.input_ids[0])
        # Padding stands behind every real token, where causal attention does not look: a mask would change nothing and
        # keep SDPA from its fast causal kernel.
        hidden = self._backbone(padded.view(rows, longest))
        return hidden.flatten(0, 1).index_select(0, slots), None, None

    def _backbone(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, H]"""
        return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def _check_head(self) -> None:
        """Some models scale or cap their logits after the head; then hidden states and head would not be the policy.

        Their configs say so; the probe finds those whose configs use other words (a cap hardly shows on small logits).
        """
        config = self.model.config.get_text_config()
        found = {key: getattr(config, key, None) for key in _CHANGES_LOGITS}
        told = [f"{key} {value}" for key, value in found.items() if value not in (None, 1)]
        probe = torch.arange(4, device=self.device)[None] % self._head.out_features
        logits = self.model(input_ids=probe, use_cache=False).logits.float()
        ours = self._head(self._backbone(probe)).float()
        if told or not torch.allclose(logits, ours, rtol=1e-3, atol=1e-3):
            reason = ", ".join(told) or "soft-capping or scaling"
            raise ValueError(
                f"{type(self.model).__name__} changes its logits after the LM head ({reason}): the "
                "learner would train another policy than the one that samples; choose a model without it"
            )


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose weights stay as they are: the reference policy of the KL term. Sharded like the model."""
    if (root := sharded(model)) is not None:
        return root.frozen_copy()
    return cast(PreTrainedModel, copy.deepcopy(model)).eval().requires_grad_(False)


def reference_policy(model: PreTrainedModel) -> PreTrainedModel:
    """The policy that the KL term holds on to: the model as it is now, or, with adapters, its base, without a copy."""
    return reference(model) if has_adapters(model) else frozen_copy(model)
