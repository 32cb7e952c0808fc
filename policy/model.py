"""PolicyModel: token ids -> hidden states -> logits, for policies of DeepSeek-V3's architecture (arXiv 2412.19437).

A ``transformers.PreTrainedModel`` over ``DeepseekV3Config`` with module names as published, so that folders pass
unchanged between this model, transformers' ``DeepseekV3ForCausalLM`` and vLLM. Inside it runs on a flat stream of
tokens: padding never reaches a layer, and packed sequences never see each other.

Shapes: B rows, T columns, N tokens of the stream, H = hidden_size, V = vocab_size, K = num_experts_per_tok,
E = n_routed_experts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from policy.attention import LatentAttention
from policy.balance import SequenceIndex
from policy.experts import Experts
from policy.inputs import check_routed_experts, plan_stream, refuse_unsupported, trainable_labels
from policy.layers import GatedMlp, RMSNorm
from policy.lora import merged_state
from policy.moe import MoE, Router, RouterReport
from policy.parallel import WholeTensors, sharded
from policy.presets import check_supported, with_vllm_fields
from policy.rope import RotaryTable
from policy.segments import Segments, scatter_rows


@dataclass(frozen=True)
class HiddenOutput:
    """What the backbone computed for a stream of N tokens.

    Attributes:
        hidden: final normalised hidden states, in the caller's token order. [N, H]
        routed_experts: chosen experts of each MoE layer, int64. list of [N, K]
        router_load: tokens sent to each expert of each MoE layer, int64. [MoE layers, E]
        router_reports: what each MoE layer's router counted.
    """

    hidden: Tensor
    routed_experts: list[Tensor]
    router_load: Tensor
    router_reports: list[RouterReport]


class DecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)); the mlp is dense in the first layers and a MoE in the others."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__()
        assert config.first_k_dense_replace is not None
        self.is_moe = index >= config.first_k_dense_replace
        self.self_attn = LatentAttention(config)
        self.mlp = MoE(config) if self.is_moe else GatedMlp(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        turns: Tensor,
        segments: Segments,
        given: Tensor | None = None,
        sequences: SequenceIndex | None = None,
    ) -> tuple[Tensor | None, ...]:
        """x [N, H] -> output [N, H]; in a MoE also chosen experts [N, K], tokens by expert [E], the router's report.

        One flat tuple: reentrant checkpointing finds gradients at no other place, and would lose the balance loss.
        """
        x = x + self.self_attn(x, self.input_layernorm, turns, segments)
        inner = self.post_attention_layernorm(x)
        if not self.is_moe:
            return (x + self.mlp(inner),)
        out, experts, load, report = self.mlp(inner, given, sequences)
        return x + out, experts, load, *report


class Backbone(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(config)

    def stream(
        self,
        tokens: Tensor,
        positions: Tensor,
        lengths: Sequence[int],
        given: Sequence[Tensor] | None = None,
        *,
        balance: bool = False,
    ) -> HiddenOutput:
        """The layers on a flat stream of sequences of these lengths. tokens, positions [N] -> the same order"""
        segments = Segments.plan(lengths, self.config.num_attention_heads, tokens.device)
        tokens, positions = segments.to_model_order(tokens), segments.to_model_order(positions)
        x = self.embed_tokens(tokens)
        turns = self.rotary(positions)
        sequences = None
        if balance:
            sequences = SequenceIndex.of(lengths, tokens.device)
            sequences = SequenceIndex(segments.to_model_order(sequences.of_token), sequences.lengths)
        routed, loads, reports = [], [], []
        for layer in self.layers:
            choice = None
            if given is not None and layer.is_moe:
                choice = segments.to_model_order(given[len(routed)])
            x, *chosen = layer(x, turns, segments, choice, sequences)
            if chosen:
                routed.append(segments.to_caller_order(chosen[0]))
                loads.append(chosen[1])
                reports.append(RouterReport(*chosen[2:]))
        load = torch.stack(loads) if loads else tokens.new_zeros(0, self.config.n_routed_experts)
        return HiddenOutput(segments.to_caller_order(self.norm(x)), routed, load, reports)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_lengths: Sequence[int] | None = None,
        routed_experts: Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of rows of tokens, zero where the mask is. See :meth:`PolicyModel.forward`. -> [B, T, H]"""
        refuse_unsupported(kwargs)
        plan = plan_stream(input_ids, attention_mask, position_ids, segment_lengths)
        experts = check_routed_experts(routed_experts, self.config, input_ids.numel(), plan.kept)
        tokens, positions = input_ids.flatten(), plan.positions
        if plan.kept is not None:
            tokens = tokens[plan.kept]
        hidden = self.stream(tokens, positions, plan.lengths, experts).hidden
        if plan.kept is not None:
            hidden = scatter_rows(hidden, plan.kept, input_ids.numel())
        # transformers annotates floats; a plain tensor is what everyone passes.
        return BaseModelOutputWithPast(last_hidden_state=hidden.view(*input_ids.shape, -1))  # pyright: ignore[reportArgumentType]


class PolicyModel(PreTrainedModel, GenerationMixin):
    """A DeepSeek-V3 policy: MLA, MoE, causal LM head.

    Example:
        >>> model = PolicyModel(preset_config("tiny"))
        >>> out = model.hidden_states(tokens[None], segment_lengths=[5, 3])  # tokens [8]: two sequences, packed
        >>> logits = model.lm_head(out.hidden)  # [8, V]

    Raises:
        ValueError: the config asks for something that DeepSeek-V3's architecture, or this model, does not have.
    """

    config: DeepseekV3Config
    config_class = DeepseekV3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules: ClassVar = ["DecoderLayer"]
    _supports_sdpa = True
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    _keep_in_fp32_modules_strict: ClassVar = ["e_score_correction_bias"]

    def __init__(self, config: DeepseekV3Config) -> None:
        check_supported(config)
        super().__init__(with_vllm_fields(config))
        # Checkpoints hold one tensor per expert, memory holds them stacked: the published architecture's conversion is
        # this model's too. Registered here and not at import, which must have no side effect.
        conversion = get_checkpoint_conversion_mapping(config.model_type)
        assert conversion is not None
        register_checkpoint_conversion_mapping(type(self).__name__, conversion, overwrite=True)
        # Published checkpoints end with multi-token-prediction layers, which no causal LM loads.
        self._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config.num_hidden_layers}\..*"]
        self.loss_type = "ForCausalLM"
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """transformers' initialisation: matrices normal with std initializer_range, norms one, correction bias zero."""
        super()._init_weights(module)
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        segment_lengths: Sequence[int],
        position_ids: Tensor | None = None,
        routed_experts: Sequence[Tensor] | None = None,
        balance: bool = False,
    ) -> HiddenOutput:
        """The backbone on packed tokens; the head is left to the caller, who may not want all N x V logits at once.

        Args:
            input_ids: packed tokens. [1, N]
            segment_lengths: tokens of each sequence, summing to N.
            position_ids: [1, N]; from 0 in each sequence when not given.
            routed_experts: the choice of experts to take instead of the router's, per MoE layer. [N, K]
            balance: have the routers report the balance loss of the sequences (``policy.balance``).

        Raises:
            ValueError: lengths, shapes or experts that do not fit together.
        """
        plan = plan_stream(input_ids, None, position_ids, segment_lengths)
        experts = check_routed_experts(routed_experts, self.config, input_ids.numel())
        return self.model.stream(input_ids.flatten(), plan.positions, plan.lengths, experts, balance=balance)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        routed_experts: Sequence[Tensor] | None = None,
        segment_lengths: Sequence[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits, and the causal LM loss when ``labels`` are given.

        Args:
            input_ids: rows of tokens [B, T], or one packed row [1, N] with ``segment_lengths``.
            attention_mask: nonzero on real tokens; padding lies on either side and gets zero logits. [B, T]
            position_ids: [B, T]; without mask and segment_lengths, a sequence ends where they do not go on by one.
            labels: next-token targets, not shifted; -100 and the first token of each sequence do not count. [B, T]
            routed_experts: choice of experts to take instead of the router's, per MoE layer. list of [B * T, K]
            segment_lengths: tokens of each packed sequence.
            return_dict: False returns a tuple.
            kwargs: ``num_items_in_batch`` (denominator of the loss; default: the targets of this call),
                ``logits_to_keep`` (compute only the last columns' logits), transformers' switches that must be off.

        Raises:
            ValueError: inputs that do not fit together.
            TypeError: an unsupported argument is on, for example ``use_cache=True``: there is no KV cache here.
        """
        items, keep = kwargs.pop("num_items_in_batch", None), kwargs.pop("logits_to_keep", 0)
        backbone = self.model(input_ids, attention_mask, position_ids, segment_lengths, routed_experts, **kwargs)
        hidden = backbone.last_hidden_state
        logits = self.lm_head(hidden[:, slice(-keep, None) if isinstance(keep, int) else keep])
        loss = None
        if labels is not None:
            stream = plan_stream(input_ids, attention_mask, position_ids, segment_lengths)
            labels = trainable_labels(labels, attention_mask, stream)
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=items)
        out = CausalLMOutputWithPast(loss=loss, logits=logits)
        return out.to_tuple() if return_dict is False else out

    def generate(self, *args: Any, use_cache: bool = False, **kwargs: Any) -> Any:
        """transformers' ``generate``, every step from scratch: for a look at a few tokens. vLLM is the sampler.

        Raises:
            ValueError: ``use_cache=True``; there is no KV cache here.
        """
        if use_cache:
            raise ValueError("PolicyModel has no KV cache: pass use_cache=False, or sample with vLLM")
        return super().generate(*args, use_cache=False, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Writes a Hugging Face folder with the published architecture name, which vLLM and transformers load.

        Raises:
            ValueError: ``push_to_hub=True``; the folder is finished only after transformers has written it.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("save to a folder first, then upload it with huggingface_hub's upload_folder")
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self.config.architectures = ["DeepseekV3ForCausalLM"]
            self.config.save_pretrained(save_directory)


def checkpoint_tensors(
    model: PreTrainedModel, state: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under their checkpoint names, one tensor per expert, tied ones once.

    For saving and for weight transfer. The tensors of a :class:`PolicyModel` are views of the live weights, not copies.
    Works for every transformers causal LM. Adapters are merged, matrix by matrix, into copies.

    Args:
        model: whose weights these are.
        state: weights to take instead of the live ones, under the names of ``model.state_dict()``; a mapping may load
            each when it is asked for.
    """
    if state is None:
        state = model.state_dict() if sharded(model) is None else WholeTensors(model)
    state = merged_state(model, state)
    tied = model.config.get_text_config().tie_word_embeddings
    left_out = getattr(model, "all_tied_weights_keys", {}) if tied else {}
    names = [name for name in state if name not in left_out]
    if not isinstance(model, PolicyModel):
        for name in names:
            yield from revert_weight_conversion(model, {name: state[name]}).items()
        return
    for name in names:
        yield from stored_form(name, state[name])


def stored_form(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter under its names in a folder: of stacked experts one tensor an expert, as views of the stack."""
    prefix, _, kind = name.rpartition(".")
    if not prefix.endswith(".experts") or tensor.ndim != 3:
        yield name, tensor
    elif kind == "gate_up_proj":
        for e, (gate, up) in enumerate(t.chunk(2) for t in tensor):
            yield f"{prefix}.{e}.gate_proj.weight", gate
            yield f"{prefix}.{e}.up_proj.weight", up
    else:
        for e, part in enumerate(tensor):
            yield f"{prefix}.{e}.{kind}.weight", part
