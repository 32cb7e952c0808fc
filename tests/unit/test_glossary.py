"""What is declared once, and names and models that are refused before they mean two things."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from transformers import Qwen2Config

from pipelines.tracking import _OWN_METRICS, METRICS
from policy.glossary import ADVANTAGE_METRICS, LEARNER_METRICS
from policy.presets import check_servable, preset_config
from rewards.base import RESERVED_METRICS, Score
from rewards.rubric import REWARD_METRICS

PARTS = (REWARD_METRICS, _OWN_METRICS, ADVANTAGE_METRICS, LEARNER_METRICS)


def test_every_metric_is_declared_exactly_once() -> None:
    """The parts are merged into one dictionary, in which a second declaration would silently win."""
    assert [name for name, count in Counter(name for part in PARTS for name in part).items() if count > 1] == []
    assert sum(map(len, PARTS)) == len(METRICS)
    assert {name: text for part in PARTS for name, text in part.items()} == METRICS


@pytest.mark.parametrize("name", ["mean", "applied", "errors", "timeouts"])
def test_a_reward_function_may_not_take_a_name_that_every_function_has(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r}: rename it"):
        Score(value=1.0, metrics={"steps": 3.0, name: 0.5})
    Score(value=1.0, metrics={"steps": 3.0, f"{name}_length": 0.5})


def test_the_names_that_every_function_has_are_all_reserved() -> None:
    shared = {name.rpartition("/")[2] for name in REWARD_METRICS if name.startswith("reward/{function}/")}
    assert shared == {*RESERVED_METRICS, "{metric}"}


@pytest.mark.parametrize(
    ("field", "words"), [("tie_word_embeddings", "a head of its own"), ("attention_bias", "leaves biases")]
)
def test_what_vllm_would_compute_otherwise_is_refused(field: str, words: str) -> None:
    check_servable(preset_config("tiny"))
    with pytest.raises(ValueError, match=f"{words}.*set {field} to false"):
        check_servable(preset_config("tiny", **{field: True}))


@pytest.mark.parametrize("fields", [{"tie_word_embeddings": True}, {"attention_bias": True}])
def test_other_architectures_may_have_both(fields: dict[str, Any]) -> None:
    check_servable(Qwen2Config(**fields))
