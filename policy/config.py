"""Every knob of the policy and its learner. Standard library only, so that a recipe loads without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (PEFT's LoRA): only they are trained, the model stays as it was loaded.

    Engines and model folders get the weights with the adapters merged; ``adapter/`` inside a model folder holds the
    adapters alone, as PEFT stores them. The reference policy of the KL term is the same model with its adapters off.
    Every stage begins with fresh adapters on what the stage before left, merged: so its reference is its own first
    model, as without adapters. A resumed stage goes on with its own. There is no dropout: the sampler has none.

    Attributes:
        rank: of the two factors, >= 1.
        alpha: the adapters' product is scaled by alpha / rank, > 0.
        targets: names of the linear layers that get adapters (``q_proj``, …); empty takes all of them but the head.
        experts: routed experts get adapters too, one pair an expert; their merged weights are made anew in each forward
            pass, which takes memory. Not with ``parallel.expert_parallel``.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ()
    experts: bool = False

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"rank must be >= 1, got {self.rank}")
        _require(0 < self.alpha < inf, f"alpha must be > 0 and finite, got {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which policy is trained. Exactly one of ``preset`` and ``path`` is set.

    Attributes:
        preset: name in ``policy.presets.PRESETS`` (random weights), e.g. ``tiny``.
        path: Hugging Face folder or hub id to start from (weights, config and tokenizer).
        overrides: config fields that replace the preset's, e.g. ``{num_hidden_layers: 3}``.
        tokenizer: folder or hub id when it is not the model's own; a preset builds its own.
        dtype: ``float32`` | ``bfloat16``; of the learner and of the engines.
        mtp: what becomes of multi-token-prediction layers, which are not trained here: ``drop`` leaves them out of
            every folder that is written (the run's events say how many), ``keep`` copies them unchanged.
        lora: train adapters only; null trains all weights.
    """

    preset: str | None = None
    path: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    dtype: str = "float32"
    mtp: str = "drop"
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        _require(self.mtp in ("drop", "keep"), f"mtp must be drop or keep, got {self.mtp!r}")
        _require((self.preset is None) != (self.path is None), "set exactly one of model.preset and model.path")
        _require(self.dtype in ("float32", "bfloat16"), f"dtype must be float32 or bfloat16, got {self.dtype!r}")


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How rewards of siblings become advantages.

    Attributes:
        scale: divide the centred reward by the ``group`` std, the ``batch`` std, or ``none`` (Dr. GRPO).
        drop_zero_variance: leave out groups whose rewards are all equal (they carry no gradient) and count them.
        epsilon: added to the std.
    """

    scale: str = "group"
    drop_zero_variance: bool = True
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        _require(self.scale in ("group", "batch", "none"), f"scale must be group, batch or none, got {self.scale!r}")
        _require(0 <= self.epsilon < inf, f"epsilon must be >= 0 and finite, got {self.epsilon}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which GRPO loss. The formula stands at the top of ``policy/loss.py``.

    Attributes:
        clip_low: the ratio is clipped from below at 1 - clip_low, [0, 1].
        clip_high: and from above at 1 + clip_high, >= 0 (DeepSeek-R1: 10; DAPO: 0.28).
        aggregation: ``token`` (sum / tokens of the mini-batch), ``sequence`` (mean over sequences of their
            token means), ``constant`` (sum / (sequences x constant_length)).
        constant_length: denominator in tokens of ``constant``; 0 takes the sampling limit max_tokens.
        kl_coef: weight of the KL term to the reference policy, >= 0; 0 loads no reference.
        kl_form: ``k3`` (Schulman's estimator) or ``unbiased`` (k3 times the importance ratio, DeepSeek-V3.2).
        importance_cap: token-level truncated importance weight exp(old_logprobs - rollout_logprobs) is cut at
            this value, > 0; None leaves the weight out.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: str = "token"
    constant_length: int = 0
    kl_coef: float = 0.0
    kl_form: str = "k3"
    importance_cap: float | None = 2.0

    def __post_init__(self) -> None:
        _require(0 <= self.clip_low <= 1, f"clip_low must be in [0, 1], got {self.clip_low}")
        _require(0 <= self.clip_high < inf, f"clip_high must be >= 0 and finite, got {self.clip_high}")
        _require(
            self.aggregation in ("token", "sequence", "constant"),
            f"aggregation must be token, sequence or constant, got {self.aggregation!r}",
        )
        _require(self.constant_length >= 0, f"constant_length must be >= 0, got {self.constant_length}")
        _require(0 <= self.kl_coef < inf, f"kl_coef must be >= 0 and finite, got {self.kl_coef}")
        _require(self.kl_form in ("k3", "unbiased"), f"kl_form must be k3 or unbiased, got {self.kl_form!r}")
        _require(
            self.importance_cap is None or 0 < self.importance_cap < inf,
            f"importance_cap must be > 0 and finite, or null, got {self.importance_cap}",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        lr: peak learning rate, > 0.
        schedule: ``constant`` | ``linear`` | ``cosine`` over the steps of the stage, after warm-up.
        min_lr_ratio: the schedule ends at lr * min_lr_ratio, [0, 1].
        warmup_steps: linear warm-up, optimizer steps.
        betas, eps, weight_decay: AdamW's (decay on matrices only).
        max_grad_norm: global gradient norm is clipped here, > 0; null never clips.
        kind: ``adamw`` (fused), or ``adamw8bit`` (torchao's, moments in 8 bits; one rank).
        offload: keep moments and fp32 masters in the CPU's memory, and update there (one rank, on a GPU).
    """

    lr: float = 1e-6
    schedule: str = "constant"
    min_lr_ratio: float = 0.0
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    kind: str = "adamw"
    offload: bool = False

    def __post_init__(self) -> None:
        _require(self.kind in ("adamw", "adamw8bit"), f"kind must be adamw or adamw8bit, got {self.kind!r}")
        _require(0 < self.lr < inf, f"lr must be > 0 and finite, got {self.lr}")
        _require(
            self.schedule in ("constant", "linear", "cosine"),
            f"schedule must be constant, linear or cosine, got {self.schedule!r}",
        )
        _require(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        _require(self.warmup_steps >= 0, f"warmup_steps must be >= 0, got {self.warmup_steps}")
        _require(0 <= self.weight_decay < inf, f"weight_decay must be >= 0 and finite, got {self.weight_decay}")
        _require(all(0 <= beta < 1 for beta in self.betas), f"betas must be in [0, 1), got {self.betas}")
        _require(0 < self.eps < inf, f"eps must be > 0 and finite, got {self.eps}")
        _require(
            self.max_grad_norm is None or 0 < self.max_grad_norm < inf,
            f"max_grad_norm must be > 0 and finite, or null (never clips), got {self.max_grad_norm}",
        )


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """What becomes of the router of a mixture of experts while it is trained.

    Attributes:
        bias: the correction bias that balances the choice: ``frozen``, or ``update`` (moved by ``bias_rate`` towards
            the less loaded experts after every optimizer step, DeepSeek-V3's auxiliary-loss-free balancing).
        bias_rate: step of that update, in scores between 0 and 1, > 0 (DeepSeek-V3: 0.001).
        balance_coef: weight of DeepSeek-V3's sequence-wise balance loss, >= 0; 0 leaves it out (DeepSeek-V3: 0.0001).
        replay: train under the experts that the sampler chose instead of the learner's own choice (a grpo stage only);
            engines then return them and rollouts carry them. The reference policy keeps its own choice.
    """

    bias: str = "frozen"
    bias_rate: float = 1e-3
    balance_coef: float = 0.0
    replay: bool = False

    def __post_init__(self) -> None:
        _require(self.bias in ("frozen", "update"), f"bias must be frozen or update, got {self.bias!r}")
        _require(0 < self.bias_rate < inf, f"bias_rate must be > 0 and finite, got {self.bias_rate}")
        _require(0 <= self.balance_coef < inf, f"balance_coef must be >= 0 and finite, got {self.balance_coef}")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many processes share the learner's work, and how.

    Attributes:
        ranks: learner processes, >= 1; parameters, gradients and optimizer state are sharded over all of them (FSDP2),
            and each computes its share of the batch. On GPUs each takes one.
        expert_parallel: ranks that share the routed experts, tokens travelling between them; divides ``ranks`` and the
            number of experts.
    """

    ranks: int = 1
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        _require(self.ranks >= 1, f"ranks must be >= 1, got {self.ranks}")
        _require(
            self.expert_parallel >= 1 and self.ranks % self.expert_parallel == 0,
            f"expert_parallel must divide ranks ({self.ranks}), got {self.expert_parallel}",
        )


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How a batch is cut and computed. Nothing here changes the loss or its gradient beyond rounding.

    Attributes:
        micro_batch_tokens: most tokens of one packed micro-batch (a longer sequence gets its own).
        logprob_chunk: tokens whose logits exist at once.
        fp32_head: compute the LM head in fp32 whatever the dtype of the model.
        threads: CPU threads of a learner process; 0 shares all cores out.
        activation_checkpointing: ``none``, or ``layer`` (keep only the input of each decoder layer for the backward
            and compute the rest again: less memory, a third more work).
        max_bad_steps: optimizer steps in a row that may be skipped because something in them is not finite, >= 0; one
            more stops the run.
    """

    micro_batch_tokens: int = 8192
    logprob_chunk: int = 2048
    fp32_head: bool = False
    threads: int = 0
    activation_checkpointing: str = "none"
    max_bad_steps: int = 2

    def __post_init__(self) -> None:
        _require(self.micro_batch_tokens >= 1, f"micro_batch_tokens must be >= 1, got {self.micro_batch_tokens}")
        _require(self.logprob_chunk >= 1, f"logprob_chunk must be >= 1, got {self.logprob_chunk}")
        _require(self.threads >= 0, f"threads must be >= 0, got {self.threads}")
        _require(
            self.activation_checkpointing in ("none", "layer"),
            f"activation_checkpointing must be none or layer, got {self.activation_checkpointing!r}",
        )
        _require(self.max_bad_steps >= 0, f"max_bad_steps must be >= 0, got {self.max_bad_steps}")
