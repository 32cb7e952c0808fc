"""Every knob of the policy and its learner. Standard library only, so that a recipe loads without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which policy is trained. Exactly one of ``preset`` and ``path`` is set.

    Attributes:
        preset: name in ``policy.presets.PRESETS`` (random weights), e.g. ``tiny``.
        path: Hugging Face folder or hub id to start from (weights, config and tokenizer).
        overrides: config fields that replace the preset's, e.g. ``{num_hidden_layers: 3}``.
        tokenizer: folder or hub id when it is not the model's own; a preset builds its own.
        dtype: ``float32`` | ``bfloat16``; of the learner and of the engines.
    """

    preset: str | None = None
    path: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
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
        _require(self.epsilon >= 0, f"epsilon must be >= 0, got {self.epsilon}")


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
        _require(self.clip_high >= 0, f"clip_high must be >= 0, got {self.clip_high}")
        _require(
            self.aggregation in ("token", "sequence", "constant"),
            f"aggregation must be token, sequence or constant, got {self.aggregation!r}",
        )
        _require(self.constant_length >= 0, f"constant_length must be >= 0, got {self.constant_length}")
        _require(self.kl_coef >= 0, f"kl_coef must be >= 0, got {self.kl_coef}")
        _require(self.kl_form in ("k3", "unbiased"), f"kl_form must be k3 or unbiased, got {self.kl_form!r}")
        _require(
            self.importance_cap is None or self.importance_cap > 0,
            f"importance_cap must be > 0 or null, got {self.importance_cap}",
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
    """

    lr: float = 1e-6
    schedule: str = "constant"
    min_lr_ratio: float = 0.0
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"lr must be > 0, got {self.lr}")
        _require(
            self.schedule in ("constant", "linear", "cosine"),
            f"schedule must be constant, linear or cosine, got {self.schedule!r}",
        )
        _require(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        _require(self.warmup_steps >= 0, f"warmup_steps must be >= 0, got {self.warmup_steps}")
        _require(self.weight_decay >= 0, f"weight_decay must be >= 0, got {self.weight_decay}")
        _require(all(0 <= beta < 1 for beta in self.betas), f"betas must be in [0, 1), got {self.betas}")
        _require(self.eps > 0, f"eps must be > 0, got {self.eps}")
        _require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"max_grad_norm must be > 0 or null, got {self.max_grad_norm}",
        )


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How a batch is cut and computed. Nothing here changes the loss or its gradient beyond rounding.

    Attributes:
        micro_batch_tokens: most tokens of one packed micro-batch (a longer sequence gets its own).
        logprob_chunk: tokens whose logits exist at once.
        fp32_head: compute the LM head in fp32 whatever the dtype of the model.
        threads: CPU threads of the learner; 0 takes all cores.
    """

    micro_batch_tokens: int = 8192
    logprob_chunk: int = 2048
    fp32_head: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        _require(self.micro_batch_tokens >= 1, f"micro_batch_tokens must be >= 1, got {self.micro_batch_tokens}")
        _require(self.logprob_chunk >= 1, f"logprob_chunk must be >= 1, got {self.logprob_chunk}")
        _require(self.threads >= 0, f"threads must be >= 0, got {self.threads}")
