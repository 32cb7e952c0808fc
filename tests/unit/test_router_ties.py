"""Router ties: where two experts score alike up to rounding, engine and learner may choose differently."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipelines.rollout_pool import RolloutPool, WeightSource
from pipelines.weight_sync import AttestationError, before_ties
from policy.model import PolicyModel
from policy.moe import Router
from policy.presets import preset_config
from policy.scorer import TokenScorer
from rollout.engine import EngineConfig
from tests.unit.test_rollout_pool import source


def router(scores: list[float], *, top_k: int = 2, groups: int = 1, top_groups: int = 1) -> Router:
    """A router of one input feature that gives these scores to the token 1.0."""
    config = preset_config("tiny", n_routed_experts=len(scores), num_experts_per_tok=top_k, n_group=groups,
                           topk_group=top_groups, hidden_size=32)  # fmt: skip
    made = Router(config)
    made.weight.data = torch.logit(torch.tensor(scores))[:, None]
    return made


@pytest.mark.parametrize(
    ("scores", "options", "margin"),
    [
        ([0.9, 0.7, 0.4, 0.2], {}, 0.3),  # .7 is chosen, .4 is not
        ([0.9, 0.7, 0.7, 0.2], {}, 0.0),
        ([0.9, 0.9, 0.4, 0.2], {}, 0.5),  # a tie between two that are both chosen changes nothing
        # Groups (.9 + .1) and (.6 + .3): the first wins by .1; inside it both experts are taken and nothing competes.
        ([0.9, 0.1, 0.6, 0.3], {"groups": 2}, 0.1),
        # The first group wins by .8; inside it .9 is chosen and .8 is not.
        ([0.9, 0.8, 0.6, 0.3], {"groups": 2, "top_k": 1}, 0.1),
    ],
)
def test_the_margin_of_a_choice_by_hand(scores: list[float], options: dict[str, Any], margin: float) -> None:
    assert router(scores, **options).margin(torch.ones(1, 1)).item() == pytest.approx(margin, abs=1e-6)


def test_the_correction_bias_takes_part() -> None:
    made = router([0.9, 0.7, 0.4, 0.2])
    made.e_score_correction_bias[2] = 0.25
    assert made.margin(torch.ones(1, 1)).item() == pytest.approx(0.05, abs=1e-6)


def test_margins_come_back_by_sequence_and_token() -> None:
    torch.manual_seed(0)
    model = PolicyModel(preset_config("tiny"))
    scorer = TokenScorer(model, chunk=64)
    sequences = [[5, 9, 7], [3, 4, 5, 6, 7, 8], [9, 2]]
    found = scorer.router_margins(sequences)
    assert [len(row) for row in found] == [2, 5, 1]
    for ids, row in zip(sequences, found, strict=True):  # each alone: the packing has not mixed them up
        assert scorer.router_margins([ids])[0] == pytest.approx(row, rel=1e-4)
    assert all(margin > 0 for row in found for margin in row)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router):
                module.weight[1:] = module.weight[0]  # every expert scores alike
    assert scorer.router_margins(sequences) == [[0.0] * len(row) for row in found]


def test_what_comes_before_a_tie() -> None:
    assert before_ties([[0.1, 1e-6, 0.1], [0.1, 0.1], [0.0]], "float32") == [1, 2, 0]
    assert before_ties([[0.1, 1e-3, 0.1]], "float32") == [3] and before_ties([[0.1, 1e-3, 0.1]], "bfloat16") == [1]


class Slot:
    index = 0


def attest(margins: list[list[float]], gaps: list[list[float]]) -> tuple[list[float], list[dict[str, Any]]]:
    """What a pool makes of two sequences of an engine that is off by ``gaps``."""
    events: list[dict[str, Any]] = []
    given: WeightSource = replace(source(), margins=lambda rows: margins)
    pool = RolloutPool(lambda index: None, EngineConfig(), 1, events.append)  # type: ignore[arg-type,return-value]
    pool._source = given
    engine = [[-1.0 + gap for gap in row] for row in gaps]
    learner = [[-1.0] * len(row) for row in gaps]
    tokens = [[0] * (len(row) + 1) for row in gaps]
    return pool._attest(Slot(), tokens, engine, learner), events  # type: ignore[arg-type]


def test_tokens_behind_a_tie_are_left_out_and_counted() -> None:
    gaps, events = attest([[0.1, 0.1, 1e-6, 0.1], [0.1] * 4], [[0.0, 0.0, 0.2, 0.02], [0.0] * 4])
    assert len(gaps) == 6 and max(gaps) == 0.0
    assert events == [{"event": "router_tie", "worker": 0, "version": 0, "left_out": 2}]


@pytest.mark.parametrize(
    ("margins", "gaps"),
    [
        ([[0.1] * 4, [0.1] * 4], [[0.0, 0.0, 0.2, 0.02], [0.0] * 4]),  # no tie anywhere: another policy
        ([[0.1, 0.1, 1e-6, 0.1], [0.1] * 4], [[0.0, 0.2, 0.2, 0.02], [0.0] * 4]),  # wrong before the tie
        ([[0.1, 0.1, 1e-6, 0.1], [0.1] * 4], [[0.0, 0.0, 0.2, 0.02], [0.0, 0.0, 0.0, 0.2]]),  # wrong elsewhere too
        ([[0.0] * 4, [0.1, 0.0, 0.1, 0.1]], [[0.2] * 4, [0.0, 0.2, 0.2, 0.2]]),  # ties everywhere prove nothing
    ],
)
def test_a_tie_excuses_nothing_else(margins: list[list[float]], gaps: list[list[float]]) -> None:
    with pytest.raises(AttestationError, match="mean something else to the engine than to the learner"):
        attest(margins, gaps)


def test_where_all_agree_nobody_asks_for_ties() -> None:
    gaps, events = attest([[0.0] * 2], [[0.0, 1e-6]])
    assert gaps == pytest.approx([0.0, 1e-6]) and events == []
