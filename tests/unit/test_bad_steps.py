"""Faults injected into whole runs: kept, told, skipped, and after the set number in a row the run stops."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.bad_steps import pinned, read_bad_step
from pipelines.cli import main
from pipelines.learner_service import LearnerService
from pipelines.tracking import read_metrics
from policy.errors import NonFiniteError
from rollout.scripted_engine import Scripted
from rollout.types import Problem
from tests.unit.local_runs import Local, run_local
from tests.unit.test_learner import weights


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    """A service sets what holds for its whole process; other tests run in this one."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


class FaultyLearner(LearnerService):
    """Its gradients of ``lm_head`` are infinite, or an update ruins its weights, in the steps that are named."""

    gradients: tuple[int, ...] = ()
    ruins: int | None = None
    asked = -1

    def begin(self, **given: Any) -> None:
        super().begin(**given)
        self.model.lm_head.weight.register_hook(lambda g: g * math.inf if self.asked in self.gradients else g)
        self.learner._optimizer._adamw.register_step_post_hook(self._ruin)

    def _ruin(self, *_: object) -> None:
        if self.asked == self.ruins:
            self.model.model.norm.weight.data[2] = math.nan

    def grpo_step(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        type(self).asked += 1
        self.before = weights(self.model)
        return super().grpo_step(*args, **kwargs)

    def sft_step(self, rows: Any) -> dict[str, float]:
        type(self).asked += 1
        self.before = weights(self.model)
        return super().sft_step(rows)


def faulty(**faults: Any) -> type[Local]:
    """Workers whose learner has these faults, counted in learner steps over the whole run."""
    service = type("Faulty", (FaultyLearner,), faults)

    class Watched(Local):
        service_class = service
        unchanged: list[int] = []  # noqa: RUF012

        def bad_updates(self) -> Any:
            found = super().bad_updates()
            if not any(update.what == "weights" for update in found) and len(found) == 1:
                after = weights(self.service.model)
                assert isinstance(self.service, FaultyLearner)
                same = all(torch.equal(value, after[name]) for name, value in self.service.before.items())
                self.unchanged.append(self.service.asked) if same else None
            return found

    return Watched


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


ONE = {"mini_batches": 1}
GRPO_ONLY = {"sft": {"steps": 1, "log_every": 1}}


def test_a_bad_gradient_is_skipped_kept_and_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = faulty(gradients=(3,))  # one supervised step, then RL: its step 2
    run = run_local(tmp_path, monkeypatch, workers, **GRPO_ONLY, grpo=ONE)
    rows = read_metrics(run / "02-grpo/metrics.jsonl")
    assert [row["learner/bad_steps"] for row in rows.values()] == [0, 0, 1, 0, 0, 0]
    assert [row["learner/optimizer_steps"] for row in rows.values()] == [1, 2, 2, 3, 4, 5]
    assert rows[3]["learner/lr"] == pytest.approx(1e-3 * (1 - 3 / 5)), "the schedule did not wait"
    assert workers.unchanged == [3]  # type: ignore[attr-defined]

    [event] = events(run, "bad_step")
    assert (event["stage"], event["step"], event["what"], event["in_a_row"]) == ("grpo", 2, "gradient", 1)
    assert event["text"] == "gradients are not finite in lm_head.weight"
    assert list(event)[-1] == "replay" and event["replay"] == "r1 replay runs/local 2 --stage grpo"
    kept = read_bad_step(run / "02-grpo", 2)
    assert kept is not None
    assert (run / event["kept"], kept["checkpoint"]) == (run / "02-grpo/bad/step-000002.json", "step-000002")
    assert (run / "02-grpo" / kept["rollouts"]).is_file()
    [update] = kept["updates"]
    assert (update["parameters"], update["optimizer_step"], update["position"]) == (["lm_head.weight"], 3, 2)
    names = sorted(path.name for path in (run / "02-grpo/checkpoints").glob("step-*"))
    assert names == ["step-000002", "step-000006"], "keep_checkpoints is 1; the one that a replay needs stays"

    # A later step is reached by leaving the update out as the run did, although nothing speaks against it now.
    capsys.readouterr()
    assert main(["replay", "runs/local", "4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["start"] == {"step": 2, "checkpoint": "step-000002"}
    assert answer["same_bits"] == answer["compared"] > 40


def poison(problem: Problem, said: Scripted) -> Scripted:
    assert said.logprobs is not None
    return replace(said, logprobs=(math.nan, *said.logprobs[1:])) if problem.prompt == "3+2=" else said


def test_a_log_probability_names_its_sequences_and_replays(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = type("Poisoned", (Local,), {"spoil": staticmethod(poison)})
    run = run_local(tmp_path, monkeypatch, workers, **GRPO_ONLY, top={"seed": 4})
    [event] = events(run, "bad_step")
    assert event["what"] == "rollout_logprobs" and len(event["problems"]) == 1
    kept = read_bad_step(run / "02-grpo", event["step"])
    assert kept is not None
    groups = [json.loads(line) for line in (run / "02-grpo" / kept["rollouts"]).read_text().splitlines()]
    assert event["problems"] == [g["problem"]["id"] for g in groups if g["problem"]["prompt"] == "3+2="]
    capsys.readouterr()

    status = main([*event["replay"].split()[1:], "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert [row for row in answer["figures"] if not row["ok"]] == []
    assert status == 0 and answer["ok"] and answer["same_bits"] == answer["compared"] > 40
    assert answer["bad"]["found"] == answer["bad"]["kept"] == kept["updates"]
    assert answer["bad"]["trace"]["output"] is None, "the model is not to blame"

    assert main(event["replay"].split()[1:]) == 0
    shown = capsys.readouterr().out
    assert f"rollout_logprobs are not finite in micro-batch" in shown and f"{event['problems'][0]}/" in shown  # noqa: F541
    assert "where it begins:" in shown and "the step is what the run folder says" in shown


def test_the_third_in_a_row_stops_the_run_in_one_line(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    workers = faulty(gradients=(3, 4, 5))
    with pytest.raises(NonFiniteError) as stopped:
        run_local(tmp_path, monkeypatch, workers, **GRPO_ONLY, grpo=ONE)
    run = Path("runs/local")
    assert str(stopped.value) == (
        "stage 'grpo', step 4: gradients are not finite in lm_head.weight; 3 optimizer steps in a row were not finite "
        "(learner.max_bad_steps is 2), so the run stops; look at it with: r1 replay runs/local 4 --stage grpo"
    )
    assert [event["step"] for event in events(run, "bad_step")] == [2, 3, 4]
    assert [event["event"] for event in events(run, "failed")] == ["failed"]
    assert sorted(read_metrics(run / "02-grpo/metrics.jsonl")) == [0, 1, 2, 3]
    assert workers.unchanged == [3, 4, 5]  # type: ignore[attr-defined]

    # Nothing in the batches is at fault, and the replay says so. It is the same on the command line.
    capsys.readouterr()
    assert main(["replay", "runs/local", "4"]) == 1
    shown = capsys.readouterr().out
    assert "found: everything was finite; so the cause is neither in the batch nor in the weights" in shown

    # A healthy learner goes on from the last checkpoint, with the count of that moment.
    assert run_local(tmp_path, monkeypatch, Local, **GRPO_ONLY, grpo=ONE) == run
    assert sorted(read_metrics(run / "02-grpo/metrics.jsonl")) == [0, 1, 2, 3, 4, 5]
    assert [event["step"] for event in events(run, "bad_step_passed")] == [4]
    assert [path.name for path in sorted((run / "02-grpo/bad").iterdir())] == ["step-000002.json", "step-000003.json"]


def test_the_limit_may_be_raised_for_a_run_that_stopped(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(NonFiniteError, match=r"1 optimizer steps in a row .*max_bad_steps is 0"):
        learner = {"max_bad_steps": 0, "micro_batch_tokens": 40}
        run_local(tmp_path, monkeypatch, faulty(gradients=(3,)), **GRPO_ONLY, grpo={**ONE, "learner": learner})
    again = {**ONE, "learner": {"max_bad_steps": 1, "micro_batch_tokens": 40}}
    run = run_local(tmp_path, monkeypatch, faulty(gradients=(0,)), **GRPO_ONLY, grpo=again)
    assert [event["step"] for event in events(run, "bad_step")] == [2, 2], "told by both processes"
    with pytest.raises(ValueError, match="group_size"):
        run_local(tmp_path, monkeypatch, Local, **GRPO_ONLY, grpo={**again, "group_size": 4})


def test_ruined_weights_stop_the_run_at_once_and_are_not_saved(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(NonFiniteError, match=r"left weights not finite in model\.norm\.weight; .*one is step-000002\)"):
        run_local(tmp_path, monkeypatch, faulty(ruins=4), **GRPO_ONLY, grpo=ONE)
    checkpoints = Path("runs/local/02-grpo/checkpoints")
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-000002"]
    assert not Path("runs/local/02-grpo/model").exists()


def test_supervised_rows_are_kept_with_the_step(tmp_path: Path, monkeypatch: Any) -> None:
    run = run_local(tmp_path, monkeypatch, faulty(gradients=(1,)), grpo={"steps": 1})
    [event] = events(run, "bad_step")
    assert (event["stage"], event["step"], event["replay"]) == ("sft", 1, "r1 replay runs/local 1 --stage sft")
    kept = read_bad_step(run / "01-sft", 1)
    assert kept is not None and kept["checkpoint"] is None
    assert len(kept["rows"]) == len(kept["problems"]) == 4
    assert all(0 < prompt < len(ids) for ids, prompt in kept["rows"])


def test_at_most_so_many_checkpoints_are_pinned(tmp_path: Path) -> None:
    assert pinned(tmp_path, 2) == []
    (tmp_path / "bad").mkdir()
    for step, name in ((3, None), (4, "step-000004"), (5, "step-000004"), (8, "step-000008"), (9, "step-000009")):
        (tmp_path / f"bad/step-{step:06d}.json").write_text(json.dumps({"checkpoint": name}))
    assert pinned(tmp_path, 2) == ["step-000009", "step-000008"]
    assert pinned(tmp_path, 9) == ["step-000009", "step-000008", "step-000004"]
