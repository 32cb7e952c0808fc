"""One rank or many: the same losses, gradients, metrics and weights, in fp64 to 1e-9; the same bytes for the engines.

The ranks are real processes over gloo, one set for 2 and one for 4 ranks, which compute every layout in turn.
"""

from __future__ import annotations

import multiprocessing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from policy.checkpoint import save_model
from policy.parallel import Ranks
from policy.tokenizer import build_tokenizer
from tests.integration.support import ranks as support
from tests.integration.support.spoilt_ranks import PARAMETER, VICTIM, spoilt

PATIENCE_S = 500
LAYOUTS = {"2 ranks": (2, 1), "4 ranks": (4, 1), "2 ranks, experts over 2": (2, 2), "4 ranks, experts over 2": (4, 2)}
TOLERANCE = 1e-9


@cache
def alone(kind: str, steps: int) -> dict[str, Any]:
    return support.train(Ranks.alone(), kind, support.STEPS[:steps])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Of 2 and of 4 ranks, what each rank wrote down."""
    folder = tmp_path_factory.mktemp("ranks")
    save_model(support.policy(torch.float32, **support.LARGE), build_tokenizer(), folder / "large")
    # A server that has imported everything forks the ranks: six processes for the price of one.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.integration.support.ranks"])
    processes = [context.Process(target=support.work, args=(r, n, str(folder))) for n in (2, 4) for r in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * 6
    return {n: [read(folder / f"{n}-{rank}.pt") for rank in range(n)] for n in (2, 4)}


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def deviation(ours: Any, theirs: Any) -> float:
    """Largest absolute difference between two nests of numbers of the same shape."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        return max((deviation(ours[key], theirs[key]) for key in theirs), default=0.0)
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        return max((deviation(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        return float((ours - theirs).abs().max())
    return 0.0 if ours == theirs else abs(ours - theirs)  # equal infinities have no difference


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.timeout(PATIENCE_S + 60)
def test_every_layout_computes_what_one_rank_does(found: dict[int, list[dict[str, Any]]], layout: str) -> None:
    size, width = LAYOUTS[layout]
    ours, theirs = found[size][0][f"policy x{width}"], alone("policy", len(support.STEPS))
    for part in theirs:
        assert deviation(ours[part], theirs[part]) < TOLERANCE, part
    assert list(ours["weights"]) == list(theirs["weights"])
    norms = [row["learner/grad_norm"] for row in theirs["metrics"]]
    assert min(norms) > 0.05, "every step was clipped"
    assert theirs["metrics"][1]["learner/kl_ref"] > 0


@pytest.mark.parametrize("kind", ["dense", "lora", "lora-experts"])
def test_other_models_on_two_ranks(found: dict[int, list[dict[str, Any]]], kind: str) -> None:
    ours, theirs = found[2][0][kind], alone(kind, 1)
    for part in theirs:
        assert deviation(ours[part], theirs[part]) < TOLERANCE, part


@pytest.mark.parametrize(("kind", "tolerance"), [("bf16", 1e-5), ("bf16-lora", 1e-5)])
def test_in_bf16_with_fp32_masters(found: dict[int, list[dict[str, Any]]], kind: str, tolerance: float) -> None:
    """The forward is the same to the bit; gradients differ in the order of their sums, adapters' are in fp32."""
    ours, theirs = found[2][0][kind], alone(kind, 1)
    assert abs(ours["losses"][0] - theirs["losses"][0]) < 1e-12
    scale = max(float(gradient.abs().max()) for gradient in theirs["gradients"].values())
    assert {name: g.dtype for name, g in ours["gradients"].items()} == {n: torch.float32 for n in theirs["gradients"]}
    assert deviation(ours["gradients"], theirs["gradients"]) < tolerance * scale
    assert {name: t.dtype for name, t in ours["weights"].items()} == {n: t.dtype for n, t in theirs["weights"].items()}


@pytest.mark.parametrize("width", [1, 2])
def test_with_layers_computed_again_in_the_backward(found: dict[int, list[dict[str, Any]]], width: int) -> None:
    ours, theirs = found[2][0][f"recomputed x{width}"], alone("policy", 1)
    for part in theirs:
        assert deviation(ours[part], theirs[part]) < TOLERANCE, part


@pytest.mark.parametrize("fault", support.FAULTS)
def test_a_fault_shows(found: dict[int, list[dict[str, Any]]], fault: str) -> None:
    ours, theirs = found[2][0][f"fault {fault}"], alone("policy", 1)
    part = "weights" if fault == "clipping" else "gradients"
    assert deviation(ours[part], theirs[part]) > 1000 * TOLERANCE


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_bytes_reach_the_engines(found: dict[int, list[dict[str, Any]]], size: int) -> None:
    here = {name: value for name, value in found[size][0].items() if name.startswith("bytes")}
    assert len(here) == {2: 7, 4: 2}[size]
    for name, checksum in here.items():
        kind = name.removeprefix("bytes ")
        assert checksum == support.published(Ranks.alone(), "policy" if kind in ("x1", "x2") else kind), name


def test_no_rank_holds_the_whole_model_during_a_sync(found: dict[int, list[dict[str, Any]]]) -> None:
    for rank in found[2]:
        memory = rank["memory"]
        assert memory["whole"] > 200
        assert memory["streamed"] < 0.25 * memory["whole"], memory
        assert memory["kept"] > 0.8 * memory["whole"], "a sync that keeps what it gathers would be seen"


def test_no_rank_holds_the_whole_model_while_it_is_loaded(found: dict[int, list[dict[str, Any]]]) -> None:
    """Half of it, and a layer of twenty."""
    for rank in found[2]:
        loading, whole = rank["loading"], rank["memory"]["whole"]
        assert loading["wrong"] == 0
        assert loading["by layer"] < 0.75 * whole and loading["adapted"] < 0.75 * whole, loading
        assert loading["whole"] > 0.9 * whole, "a rank that loads the whole model would be seen"


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_hold_different_weights_are_refused(found: dict[int, list[dict[str, Any]]], size: int) -> None:
    """One value of one tensor on one rank, which would stay where that rank's part is."""
    told = "learner rank 1 holds other weights of PolicyModel than rank 0"
    assert [rank["different"][: len(told)] for rank in found[size]] == [told] * size


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_decide_alike_on_what_went_wrong_on_one(found: dict[int, list[dict[str, Any]]], size: int) -> None:
    """That they came to an end says it too: ranks that do not skip the same update wait for each other for ever."""
    first, *others = found[size][0]["spoilt"]
    assert len(others) == size - 1 and all(other == first for other in others)
    bad = [step[0][0] if step[0] else None for step in first]
    assert [update and (update[0], update[2], update[3], update[4:]) for update in bad] == [
        None,
        ("advantages", (VICTIM,), (), (1, False)),
        ("gradient", (), (PARAMETER,), (2, False)),
        None,
        ("weights", (), (PARAMETER,), (1, True)),
    ]
    assert [step[1] for step in first] == [1, 1, 1, 2, 3], "optimizer steps"
    [alone] = spoilt(Ranks.alone())
    same = [[(what, *rest) for what, _, *rest in step[0]] for step in alone]
    assert same == [[(what, *rest) for what, _, *rest in step[0]] for step in first], "as one rank would"
