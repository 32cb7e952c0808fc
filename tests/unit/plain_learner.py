"""The least that can be saved in a checkpoint, for tests of how it is written."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from policy.config import ModelConfig

TINY = ModelConfig(preset="tiny", overrides={"hidden_size": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8})


class Plain:
    """The least that can be saved: a model, moments and a counter."""

    def __init__(self, model: PreTrainedModel, steps: int = 0, moments: torch.Tensor | None = None) -> None:
        self.model, self.steps = model, steps
        self.moments = torch.arange(5.0) if moments is None else moments

    def prepare_moments(self, names: Collection[str]) -> None:
        assert not names

    def state_dict(self) -> dict[str, Any]:
        return {"model": dict(self.model.state_dict()), "moments": self.moments, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
