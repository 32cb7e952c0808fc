"""``r1 replay``: a stored step comes out the same to the last bit, and what was changed since is noticed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.bad_steps import read_bad_step
from pipelines.cli import main
from pipelines.replay import compare, figures_table, lines
from pipelines.replay_run import StoredStage, _ranges
from pipelines.tracking import METRICS, OF_ENGINES, TIMES, declared_name, read_metrics
from policy.glossary import LEARNER_OF_THE_CUT
from policy.trace import Trace
from tests.unit.local_runs import Local, run_local
from tests.unit.test_learner import batch, learner, policy


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: 5 supervised steps, 6 of RL; of each stage the last checkpoint is left."""
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        run_local(folder, patch)
    return folder


@pytest.fixture
def run(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that a test may spoil."""
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("runs/local")


def replay(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = main(["replay", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


# -- good steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "stage", "start", "figures"),
    [("4", "grpo", (0, None), 60), ("0", "grpo", (0, None), 60), ("3", "sft", (0, None), 15)],
)
def test_a_step_comes_out_the_same_to_the_last_bit(
    run: Path, capsys: Any, step: str, stage: str, start: tuple[int, str | None], figures: int
) -> None:
    status, answer = replay(capsys, str(run), step, "--stage", stage)
    assert (status, answer["ok"], answer["bad"]) == (0, True, None)
    assert (answer["start"]["step"], answer["start"]["checkpoint"]) == start
    assert answer["tolerance"]["relative"] == answer["tolerance"]["absolute"] == 0
    assert answer["same_bits"] == answer["compared"] == len(answer["figures"]) > figures
    assert answer["worst"]["deviation"] == 0
    logged = read_metrics(run / ("01-sft" if stage == "sft" else "02-grpo") / "metrics.jsonl")[int(step)]
    names = [row["name"] for row in answer["figures"]] + [n for each in answer["not_compared"].values() for n in each]
    assert sorted(names) == sorted(name for name in logged if name != "step"), "no figure is passed over"


def test_from_a_checkpoint_it_is_the_same_and_the_last_stage_is_taken_by_itself(run: Path, capsys: Any) -> None:
    """The checkpoint of step 4 stands in for the one that was pruned: the run goes on from it as a killed one would."""
    (run / "02-grpo/done").unlink()
    shutil.rmtree(run / "02-grpo/checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Local, "learner_step", _killed_at(5, Local.learner_step))
        with pytest.raises(KeyboardInterrupt):
            run_local(Path.cwd(), patch)
    assert [path.name for path in (run / "02-grpo/checkpoints").glob("step-*")] == ["step-000004"]
    status, answer = replay(capsys, str(run), "4")
    assert (status, answer["stage"], answer["start"]) == (0, "grpo", {"step": 4, "checkpoint": "step-000004"})
    assert answer["same_bits"] == answer["compared"]
    shutil.rmtree(run / "01-sft/model")  # the reference of the KL term
    assert main(["replay", str(run), "4"]) == 1
    told = capsys.readouterr().err
    assert "step 4 of stage 'grpo' cannot be computed again" in told and "is gone; steps that can be: none" in told


def _killed_at(call: int, original: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[int] = []

    def patched(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return original(*args)

    return patched


def test_the_table_says_what_was_held_against_what(run: Path, capsys: Any) -> None:
    assert main(["replay", str(run), "1"]) == 0
    shown = capsys.readouterr().out
    assert "learner/grad_norm" in shown and " ok" in shown and "differs" not in shown
    assert "step 1 of grpo: from the stage's first model, 1 steps repeated before it, 1 threads" in shown
    assert "allowed deviation: none (the machine, the threads and torch are those of the run" in shown
    assert "not comparable, times and rates: rollout/tokens_per_s, sync/seconds, learner/tokens_per_s" in shown
    assert "not recomputed, answers of engines: sync/canary_mean_abs" in shown
    assert shown.rstrip().endswith("the step is what the run folder says")


# -- what was changed is noticed ---------------------------------------------------------------------------------------


def change_score(run: Path) -> None:
    path = run / "02-grpo/rollouts/step-000001.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["rollouts"][0]["scores"]["random"] += 0.25
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_token(run: Path) -> None:
    path = run / "02-grpo/rollouts/step-000000.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["rollouts"][1]["completion"]["token_ids"][0] ^= 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_weight(run: Path) -> None:
    path = run / "01-sft/model/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] *= 1.001
    save_file(tensors, path, metadata={"format": "pt"})


def change_figure(run: Path) -> None:
    path = run / "02-grpo/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["learner/grad_norm"] = math.nextafter(rows[1]["learner/grad_norm"], 0)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("change", "shows_in", "leaves"),
    [
        (change_score, "reward/mean", "rollout/length_mean"),
        (change_token, "mismatch/mean_abs", "reward/mean"),
        (change_weight, "mismatch/mean_abs", "reward/mean"),
        (change_figure, "learner/grad_norm", "learner/loss"),
    ],
)
def test_what_was_changed_since_is_noticed(
    run: Path, capsys: Any, change: Callable[[Path], None], shows_in: str, leaves: str
) -> None:
    change(run)
    status, answer = replay(capsys, str(run), "1")
    assert (status, answer["ok"]) == (1, False)
    verdicts = {row["name"]: row["ok"] for row in answer["figures"]}
    assert (verdicts[shows_in], verdicts[leaves]) == (False, True)
    assert "the step is NOT what the run folder says" in lines(answer)


def change_row(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Another line for step 1 in metrics.jsonl."""
    path = run / "02-grpo/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1] = change(rows[1])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_rollout(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another first rollout of step 1."""
    path = run / "02-grpo/rollouts/step-000001.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[0]["rollouts"][0])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("row", [{"step": 1}, {"step": 1, "seconds/rollout": 1.0}], ids=["empty", "times"])
def test_a_step_of_which_nothing_can_be_compared_is_not_ok(run: Path, capsys: Any, row: dict[str, Any]) -> None:
    change_row(run, lambda logged: row)
    status, answer = replay(capsys, str(run), "1")
    assert (status, answer["ok"], answer["compared"]) == (1, False, 0)
    assert any(line.startswith("nothing was compared") for line in lines(answer))


def test_a_figure_that_was_taken_out_is_not_ok(run: Path, capsys: Any) -> None:
    change_row(run, lambda logged: {k: v for k, v in logged.items() if k != "learner/grad_norm"})
    status, answer = replay(capsys, str(run), "1")
    assert (status, answer["ok"]) == (1, False) and answer["same_bits"] == answer["compared"] > 40
    assert "not logged, though the step gives them: learner/grad_norm" in lines(answer)


@pytest.mark.parametrize("key", ["reward", "advantage"])
@pytest.mark.parametrize("value", [55.0, None])
def test_a_stored_reward_or_advantage_follows_from_the_scores(
    run: Path, capsys: Any, key: str, value: float | None
) -> None:
    change_rollout(run, lambda rollout: rollout.update({key: value}))
    status, answer = replay(capsys, str(run), "1")
    [differs] = [row for row in answer["figures"] if row["ok"] is not True]
    assert (status, differs["logged"], differs["ok"]) == (1, value, False)
    assert differs["name"].startswith(f"stored {key} of ") and differs["name"].endswith("/0")


@pytest.mark.parametrize("first", [True, False])
def test_two_lines_of_one_step_are_refused(run: Path, capsys: Any, first: bool) -> None:
    path = run / "02-grpo/metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([rows[1], *rows] if first else [*rows, rows[1]]))
    assert main(["replay", str(run), "1"]) == 1
    assert "metrics.jsonl has 2 lines of step 1, where a run writes one" in capsys.readouterr().err


BAD = "02-grpo/bad/step-000001.json"
ROLLOUTS = "02-grpo/rollouts/step-000001.jsonl"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (ROLLOUTS, "", "step-000001.jsonl holds no rollout"),
        (BAD, "[]", "step-000001.json is damaged (it lacks or spoils: updates)"),
        (BAD, "{}", "step-000001.json is damaged (it lacks or spoils: updates)"),
        (BAD, '{"updates": [{"mini_batch": 0}]}', "(it lacks or spoils: what, text, parameters, losses, sequences,"),
        ("events.jsonl", "[1]\n", "events.jsonl:1: this line is damaged"),
        ("events.jsonl", "{}\ngarbage\n", "events.jsonl:2: this line is damaged"),
        ("events.jsonl", '{"stage": "grpo", "event": "resumed"}\n', "events.jsonl:1: this line is damaged"),
        ("02-grpo/metrics.jsonl", '{"step": 1, "learner/loss": [1]}\n', "metrics.jsonl: a figure is no number"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(run: Path, capsys: Any, file: str, content: str, words: str) -> None:
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_text(content)
    assert_one_line(run, capsys, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["scores"].update(bogus=9.0), "it has a score of 'bogus', which is no reward function of the"),
        (lambda r: r["scores"].update(random="1"), "the score '1' of 'random' is no number"),
        (lambda r: r["completion"].update(routed_experts=5), "routed_experts 5 is no text"),
        (lambda r: r.update(advantage="x"), "the reward or advantage 'x' is no number"),
    ],
)
def test_a_damaged_rollout_is_named_in_one_line(run: Path, capsys: Any, change: Any, words: str) -> None:
    change_rollout(run, change)
    assert_one_line(run, capsys, f"sample 0: {words}")


def assert_one_line(run: Path, capsys: Any, words: str) -> None:
    capsys.readouterr()
    assert main(["replay", str(run), "1"]) == 1
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and "--debug" not in told, told


def test_elsewhere_sums_may_round_differently_within_a_tolerance(run: Path, capsys: Any) -> None:
    events = run / "events.jsonl"
    events.write_text(events.read_text().replace('"cpu": "', '"cpu": "another '))
    change_figure(run)
    status, answer = replay(capsys, str(run), "1")
    assert (status, answer["tolerance"]["relative"], answer["tolerance"]["absolute"]) == (0, 1e-3, 1e-5)
    assert answer["tolerance"]["reason"].startswith("cpu another ")
    assert answer["same_bits"] == answer["compared"] - 1
    assert answer["worst"]["name"] == "learner/grad_norm" and 0 < answer["worst"]["deviation"] < 1e-12
    change_score(run)
    assert replay(capsys, str(run), "1")[0] == 1


def test_what_several_ranks_pack_otherwise_is_left_out(run: Path, capsys: Any) -> None:
    for path, old, new in (
        ("recipe.resolved.yaml", "ranks: 1", "ranks: 2"),
        ("events.jsonl", '"ranks": 1', '"ranks": 2'),
    ):
        text = (run / path).read_text()
        assert old in text
        (run / path).write_text(text.replace(old, new))
    status, answer = replay(capsys, str(run), "1")
    assert (status, answer["not_compared"]["ranks"]) == (0, ["learner/pack_fill"])
    assert answer["tolerance"]["reason"] == "ranks 2 then, 1 now"
    assert "not comparable, they depend on the number of ranks: learner/pack_fill" in lines(answer)


# -- what cannot be replayed -------------------------------------------------------------------------------------------


def test_what_cannot_be_replayed_is_said_in_one_line_with_what_can(run: Path, capsys: Any, tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["replay", *arguments]) == 1
        told = capsys.readouterr()
        assert told.err.count("\n") == 1 and told.out == ""
        return told.err

    assert "is no run folder" in refused(str(tmp_path / "runs"), "1")
    assert "no training stage 'rl' that has begun (there are: sft, grpo)" in refused(str(run), "1", "--stage", "rl")
    assert "has no figures of step 6 (logged are: 0-5)" in refused(str(run), "6")
    assert "step 2 (it logs every 2 steps; logged are: 1, 3-4)" in refused(str(run), "2", "--stage", "sft")
    (run / "02-grpo/rollouts/step-000002.jsonl").unlink()
    assert "no rollouts of step 2 are stored; steps that can be: 0-1" in refused(str(run), "4")
    shutil.rmtree(run / "01-sft/model")
    assert "steps that can be: none" in refused(str(run), "1")


@pytest.mark.parametrize("verb", ["replay", "verify"])
def test_what_keeps_nothing_does_not_promise_to_go_on(run: Path, capsys: Any, monkeypatch: Any, verb: str) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.replay.report", interrupted)
    monkeypatch.setattr("pipelines.verify.verify", interrupted)
    assert main([verb, *([str(run), "1"] if verb == "replay" else ["local.yaml"])]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "r1: interrupted; the same command begins again"


def test_steps_are_told_as_ranges() -> None:
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert _ranges([]) == ""


def test_versions_of_an_earlier_stage_of_rl_count(run: Path) -> None:
    stage = StoredStage(run, None)
    assert (stage.base_version, stage.first_model) == (0, run / "01-sft/model")
    stage.index, stage.trained = 2, [*stage.trained, (2, stage.stage)]
    assert (stage.base_version, stage.first_model) == (6, run / "02-grpo/model")


# -- bad steps ---------------------------------------------------------------------------------------------------------


class Overflowing(Local):
    """From its third learner step on, one expert's weights are so large that their product overflows."""

    @staticmethod
    def before_step(workers: Local, step: int) -> None:
        if step == 2:
            experts = workers.service.model.model.layers[1].mlp.experts
            experts.down_proj.data.mul_(1e30)
            experts.gate_up_proj.data.mul_(1e30)


def test_where_an_overflow_begins_is_shown(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Broken weights come back from the checkpoint: what the steps before them made of them is not repeated."""
    sft = {"steps": 4, "log_every": 1, "optimizer": {"lr": 1e-3}, "learner": {"max_bad_steps": 9}}
    top = {"run": {"checkpoint_every": 1, "checkpoint_background": False, "cpus": 1}}
    run = run_local(tmp_path, monkeypatch, Overflowing, top=top, sft=sft, grpo={"steps": 1})
    kept = read_bad_step(run / "01-sft", 3)
    assert kept is not None and kept["checkpoint"] == "step-000003"
    assert kept["updates"][0]["what"] == "logprobs" and len(kept["updates"][0]["sequences"]) == 4
    status, answer = replay(capsys, str(run), "3", "--stage", "sft")
    assert (status, answer["start"]["step"]) == (0, 3)
    trace = answer["bad"]["trace"]
    assert trace["output"] == "model.layers.1.mlp.experts" and trace["inputs_finite"]
    assert answer["bad"]["found"][0]["losses"] == ["nan"]


def test_a_trace_tells_forward_from_backward() -> None:
    model = policy()
    ours = learner(model)
    with Trace(model) as healthy:
        ours.step(batch())
    assert healthy.to_json() == {"output": None, "inputs_finite": True, "gradient": None, "parameters": []}
    assert "every gradient was finite" in healthy.sentence()
    assert not model.model.norm._forward_hooks and not model.model.norm.weight._backward_hooks

    name = "model.layers.1.post_attention_layernorm.weight"
    handle = model.get_parameter(name).register_hook(lambda g: g * math.nan)
    with Trace(model) as backward:
        ours.step(batch())
    handle.remove()
    assert (backward.output, backward.gradient) == (None, None)
    assert backward.parameters == [name]
    assert backward.sentence().endswith(f"in the gradient of {name}")

    handle = model.model.layers[1].register_forward_hook(lambda module, args, out: (out[0].log(), *out[1:]))
    with Trace(model) as between:
        ours.step(batch())
    handle.remove()
    assert between.output == "model.layers.1" and between.inputs_finite
    assert "model.layers.1 (its inputs were finite)" in between.sentence()


# -- leaves ------------------------------------------------------------------------------------------------------------


def test_every_metric_is_a_time_an_answer_of_engines_or_computed() -> None:
    """What a sentence says of seconds, and what is left out of a replay, are the same."""
    assert METRICS.keys() >= TIMES | OF_ENGINES and not TIMES & OF_ENGINES
    of_time = {name for name, text in METRICS.items() if "second" in text.lower() or "per_s" in name}
    assert of_time == TIMES
    of_engines = {name for name in METRICS if name.startswith("eval/") or "canary" in METRICS[name]}
    assert of_engines == OF_ENGINES
    assert METRICS.keys() >= LEARNER_OF_THE_CUT and not LEARNER_OF_THE_CUT & (TIMES | OF_ENGINES)
    assert declared_name("seconds/rollout") in TIMES and declared_name("eval/x/greedy") in OF_ENGINES
    assert declared_name("learner/loss") == "learner/loss" and declared_name("no/such") is None


def test_figures_are_held_against_each_other() -> None:
    nan = math.nan
    logged = {"step": 1.0, "learner/loss": 1.0, "learner/lr": nan, "reward/mean": 0.5, "learner/tokens_per_s": 9.0}
    found = {"learner/loss": 1.0005, "learner/lr": nan, "learner/entropy": 2.0, "sync/canary_max_abs": 0.0}
    out = {"times": TIMES, "engines": OF_ENGINES}
    exact, loose = compare(logged, found, out, 0.0, 0.0), compare(logged, found, out, 1e-3, 0.0)
    assert [figure.name for figure in exact] == ["learner/loss", "learner/lr", "reward/mean", "learner/entropy"]
    assert [figure.ok for figure in exact] == [False, True, False, None], "lost ones differ, new ones are only shown"
    assert [figure.ok for figure in loose] == [True, True, False, None]
    assert [figure.ok for figure in compare({"learner/lr": nan}, {"learner/lr": 1.0}, {}, 1.0, 1.0)] == [False]
    rows = [{"name": "a/[b]", "logged": 1 / 3, "recomputed": "nan", "ok": False}]
    assert figures_table(rows).row_count == 1
