"""``r1 eval --benchmarks`` without an engine: what is drawn once, kept through every interruption, and refused."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evals.benchmark import find_benchmark
from evals.benchmark_data import digest, load_benchmark
from evals.page import write_pages
from evals.protocol import protocol_of
from evals.samples import Status, read_samples
from pipelines.cli import main
from pipelines.eval_run import EvalPlan, evaluate_benchmarks
from pipelines.eval_samplers import Ask, Drawn, rendered
from pipelines.eval_verb import fingerprint
from pipelines.eval_view import LineView
from rollout.types import Problem

ROOT = Path(__file__).parents[2]
OWN = """
task: sums
data_file: sums.jsonl
doc_to_text: "What is {{question}}?"
doc_to_target: "{{answer}}"
repeats: 2
metadata: {version: 1}
"""


class Told:
    """A sampler that answers from a table: right for even sums, else wrong; it may end early."""

    def __init__(self, dies_after: int = 10**9) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.dies_after = dies_after
        self.forced_think = True
        self.closed = 0

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "told"}

    def start(self, problems: Sequence[Problem]) -> None:
        self.started = len(problems)

    def draw(self, asks: Iterable[Ask]) -> Iterator[Drawn]:
        for count, ask in enumerate(asks):
            if count == self.dies_after:
                raise ValueError("the endpoint died")
            self.asked.append((ask.problem.id, ask.index, ask.seed))
            total = int(ask.problem.answer)
            said = total if total % 2 == 0 else total + 1
            text = f"{total}</think>\\boxed{{{said}}}" if ask.index == 0 or total % 3 else "on and on"
            yield Drawn(problem=ask.problem, index=ask.index, seed=ask.seed, text=text, tokens=len(text),
                        finish_reason="stop" if "boxed" in text else "length")  # fmt: skip

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A benchmark of ten sums."""
    rows = [{"question": f"{a}+{b}", "answer": str(a + b)} for a, b in [(1, n) for n in range(10)]]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(OWN)
    return tmp_path / "sums.yaml"


@pytest.fixture(autouse=True)
def no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages take longer than all the rest; one test writes them."""
    monkeypatch.setattr("pipelines.eval_run.write_pages", lambda folder: None)


def plan(own: Path, **changes: Any) -> EvalPlan:
    benchmark = find_benchmark(own)
    protocol = protocol_of("deepseek", max_tokens=64)
    data = load_benchmark(benchmark, protocol=protocol, data_dir=own.parent)
    made = EvalPlan(
        model="told", identity={"model": "told", "weights": "1"}, benchmarks=[data], samples={"sums": 2},
        protocol=protocol, seed=0, out=own.parent / "out", processes=1,
    )  # fmt: skip
    return replace(made, **changes)


def view() -> LineView:
    return LineView(io.StringIO())


def test_every_sample_is_drawn_once_and_graded(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.eval_run.write_pages", write_pages)
    sampler = Told()
    summary = evaluate_benchmarks(plan(own), sampler, view())
    samples = read_samples(own.parent / "out" / "sums")
    assert len({sample.key for sample in samples}) == len(samples) == 20 == len(sampler.asked)
    assert len({seed for _, _, seed in sampler.asked}) == 20 and sampler.closed == 1
    row = summary["results"]["sums"]
    # Sums 1 to 10. Even and no multiple of three: 2, 4, 8, 10, right twice; 6: right once, then no answer.
    assert (row["n"], row["k"], row["samples"], row["missing"]) == (10, 2, 20, 0)
    assert row["pass_at_1"] == pytest.approx((4 * 2 + 1) / 20)
    assert row["pass_at"]["2"]["value"] == pytest.approx(0.5)
    assert row["shares"]["truncated"] == row["shares"]["unanswered"] == pytest.approx(3 / 20)
    assert 0 <= row["ci95"][0] < row["pass_at_1"] < row["ci95"][1] <= 1
    assert json.loads((own.parent / "out/summary.json").read_text()) == json.loads(json.dumps(summary))
    assert not (own.parent / "out/sums/drawn.jsonl").exists()
    for page in ("report.md", "report.html"):
        assert "sums" in (own.parent / "out" / page).read_text()


@pytest.mark.parametrize("after", [0, 7, 19])
def test_what_dies_midway_goes_on_without_a_lost_or_doubled_sample(own: Path, after: int) -> None:
    first, second = Told(dies_after=after), Told()
    with pytest.raises(ValueError, match="the endpoint died"):
        evaluate_benchmarks(plan(own), first, view())
    evaluate_benchmarks(plan(own), second, view())
    assert len(first.asked) == after and len(first.asked) + len(second.asked) == 20
    assert not set(first.asked) & set(second.asked)
    whole = Told()
    evaluate_benchmarks(plan(own, out=own.parent / "whole"), whole, view())
    key = lambda sample: sample.key  # noqa: E731
    assert sorted(read_samples(own.parent / "out/sums"), key=key) == sorted(
        read_samples(own.parent / "whole/sums"), key=key
    )
    assert whole.asked == [*first.asked, *second.asked]


def test_a_finished_evaluation_draws_nothing_and_more_samples_draw_the_rest(own: Path) -> None:
    evaluate_benchmarks(plan(own), Told(), view())
    again, more = Told(), Told()
    before = json.loads((own.parent / "out/summary.json").read_text())
    summary = evaluate_benchmarks(plan(own), again, view())
    assert again.asked == [] and not hasattr(again, "started")
    assert summary["results"] == before["results"]
    summary = evaluate_benchmarks(plan(own, samples={"sums": 3}), more, view())
    assert len(more.asked) == 10 and {index for _, index, _ in more.asked} == {2}
    assert summary["results"]["sums"]["k"] == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed was 0, now it is 1"),
        ({"identity": {"model": "told", "weights": "2"}}, 'model.weights was "1", now it is "2"'),
        ({"protocol": protocol_of("deepseek", max_tokens=65)}, "protocol.sampling.max_tokens was 64, now it is 65"),
        ({"limit": 3}, "sums.limit was 0, now it is 3"),
    ],
)
def test_another_evaluation_in_the_same_folder_is_refused(own: Path, changes: dict[str, Any], words: str) -> None:
    evaluate_benchmarks(plan(own), Told(), view())
    before = (own.parent / "out/eval.json").read_text()
    with pytest.raises(ValueError, match=re.escape(words)):
        evaluate_benchmarks(plan(own, **changes), Told(), view())
    assert (own.parent / "out/eval.json").read_text() == before


def test_a_question_in_other_words_is_refused(own: Path) -> None:
    evaluate_benchmarks(plan(own), Told(), view())
    own.write_text(OWN.replace("What is", "How much is"))
    with pytest.raises(ValueError, match="its problems, gold answers or grader have changed"):
        evaluate_benchmarks(plan(own), Told(), view())


@pytest.mark.parametrize(
    "changed",
    [
        OWN.replace("{{answer}}", "{{other}}"),
        OWN + 'doc_id: "{{other}}"\n',
        OWN + "grader: {path: 'mine.py:judge'}\n",
    ],
    ids=["gold", "ids", "grader"],
)
def test_samples_of_a_benchmark_that_was_edited_are_not_mixed_with_new_ones(own: Path, changed: str) -> None:
    rows = [{**json.loads(line), "other": f"1{i}"} for i, line in enumerate((own.parent / "sums.jsonl").open())]
    (own.parent / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (own.parent / "mine.py").write_text("def judge(completion):\n    return 1.0\n")
    evaluate_benchmarks(plan(own), Told(), view())
    own.write_text(changed)
    for samples in (2, 3):
        with pytest.raises(ValueError, match="holds samples of sums as it was before"):
            evaluate_benchmarks(plan(own, samples={"sums": samples}), Told(), view())


def test_the_source_of_a_grader_is_part_of_what_was_evaluated(own: Path) -> None:
    (own.parent / "mine.py").write_text("def judge(completion):\n    return 1.0\n")
    own.write_text(OWN + "grader: {path: 'mine.py:judge'}\n")
    before = digest(plan(own).benchmarks[0])
    assert digest(plan(own).benchmarks[0]) == before
    (own.parent / "mine.py").write_text("def judge(completion):\n    return 0.0\n")
    assert digest(plan(own).benchmarks[0]) != before


def test_samples_that_nobody_knows_are_not_taken_for_ones_own(own: Path) -> None:
    evaluate_benchmarks(plan(own), Told(), view())
    (own.parent / "out/eval.json").unlink()
    with pytest.raises(ValueError, match=r"holds samples, and .* does not say of what"):
        evaluate_benchmarks(plan(own, identity={"model": "other"}), Told(), view())


def test_the_folder_of_a_run_is_not_written_into(own: Path) -> None:
    (own.parent / "out").mkdir()
    (own.parent / "out/recipe.resolved.yaml").write_text("")
    with pytest.raises(ValueError, match="is the folder of a run"):
        evaluate_benchmarks(plan(own), Told(), view())
    assert not (own.parent / "out/eval.json").exists()


def test_an_evaluation_that_drew_nothing_holds_no_folder(own: Path) -> None:
    with pytest.raises(ValueError, match="died"):
        evaluate_benchmarks(plan(own, identity={"endpoint": "http://localhost:9"}), Told(dies_after=0), view())
    assert evaluate_benchmarks(plan(own), Told(), view())["results"]["sums"]["samples"] == 20


@pytest.mark.parametrize("text", ["[]", '{"benchmarks": []}', '{"benchmarks": {"sums": 5}}', "{", "5"])
def test_a_damaged_note_of_what_was_asked_is_one_line(own: Path, text: str) -> None:
    evaluate_benchmarks(plan(own), Told(), view())
    (own.parent / "out/eval.json").write_text(text)
    with pytest.raises(ValueError, match=r"eval\.json is damaged"):
        evaluate_benchmarks(plan(own), Told(), view())


@pytest.mark.parametrize("text", ["{", "[]", '{"results": 5}', '{"results": {}, "seconds": "x"}'])
def test_a_damaged_summary_is_written_anew(own: Path, text: str) -> None:
    before = evaluate_benchmarks(plan(own), Told(), view())
    (own.parent / "out/summary.json").write_text(text)
    assert evaluate_benchmarks(plan(own), Told(), view())["results"] == before["results"]


def test_what_drew_is_remembered_when_nothing_is_left_to_draw(own: Path) -> None:
    class Counting(Told):
        def describe(self) -> Mapping[str, Any]:
            return {"kind": "endpoint", "faults": {"429": len(self.asked)}, "uncounted": 1}

    with pytest.raises(ValueError, match="died"):
        evaluate_benchmarks(plan(own), Counting(dies_after=5), view())
    first = evaluate_benchmarks(plan(own), Counting(), view())
    assert first["sampler"] == {"kind": "endpoint", "faults": {"429": 15}, "uncounted": 1}
    assert evaluate_benchmarks(plan(own), Counting(), view())["sampler"] == first["sampler"]
    more = evaluate_benchmarks(plan(own, samples={"sums": 3}), Counting(), view())
    assert more["sampler"] == {"kind": "endpoint", "faults": {"429": 25}, "uncounted": 2}
    assert more["forced_think"] is True


@pytest.mark.parametrize("row", [{}, {"text": "x"}, {"text": None, "seed": 1, "tokens": 1, "finish_reason": "stop"}])
def test_a_drawn_row_that_is_no_completion_is_one_line(own: Path, row: dict[str, Any], capsys: Any) -> None:
    with pytest.raises(ValueError, match="died"):
        evaluate_benchmarks(plan(own), Told(dies_after=1), view())
    line = json.dumps({"problem": "sums/5", "index": 0, "completion": row})
    with (own.parent / "out/sums/drawn.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises((ValueError, OSError), match=r"drawn\.jsonl.*(no whole completion|no drawn completion)"):
        evaluate_benchmarks(plan(own), Told(), view())


def test_a_torn_end_is_told(own: Path, capsys: Any) -> None:
    evaluate_benchmarks(plan(own), Told(), view())
    path = own.parent / "out/sums/samples.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-3])
    evaluate_benchmarks(plan(own), Told(), view())
    assert "left unfinished were cut off" in capsys.readouterr().err
    assert len(read_samples(own.parent / "out/sums")) == 20


def test_two_at_a_time_in_one_folder_are_refused(own: Path) -> None:
    class Meanwhile(Told):
        def start(self, problems: Sequence[Problem]) -> None:
            with pytest.raises(OSError, match="open in this process already"):
                evaluate_benchmarks(plan(own), Told(), view())
            super().start(problems)

    evaluate_benchmarks(plan(own), Meanwhile(), view())


RAISES = "def judge(completion, problem):\n    raise KeyError('no such column')\n"


def test_a_grader_that_raises_is_counted_and_never_a_wrong_answer(own: Path, capsys: Any) -> None:
    (own.parent / "mine.py").write_text(RAISES)
    own.write_text(OWN + "grader: {path: 'mine.py:judge'}\n")
    made = plan(own, search=(str(own.parent),))
    row = evaluate_benchmarks(made, Told(), view())["results"]["sums"]
    assert row["pass_at_1"] is None and row["shares"]["error"] == 1.0 and row["n"] == 0
    assert "KeyError" in next(iter(row["errors"].values()))
    assert {sample.status for sample in read_samples(made.out / "sums")} == {Status.ERROR}


SLOW = """
import sys, time, io
from tests.unit.test_eval_driver import Told, plan, evaluate_benchmarks, LineView
from pathlib import Path
class Slow(Told):
    def draw(self, asks):
        for drawn in super().draw(asks):
            time.sleep(0.02)
            yield drawn
            print("drawn", flush=True)
evaluate_benchmarks(plan(Path(sys.argv[1])), Slow(), LineView(io.StringIO()))
"""


def test_a_killed_evaluation_goes_on(own: Path) -> None:
    for count in (3, 6):
        child = subprocess.Popen([sys.executable, "-c", SLOW, str(own)], cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout is not None
        for _ in range(count):
            assert child.stdout.readline() == b"drawn\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    rest = Told()
    evaluate_benchmarks(plan(own), rest, view())
    assert 20 - len(rest.asked) in range(9, 13)  # a kill may come while the next one is drawn
    samples = read_samples(own.parent / "out/sums")
    assert len({sample.key for sample in samples}) == len(samples) == 20


def test_the_view_says_how_far_it_is() -> None:
    stream = io.StringIO()
    shown = LineView(stream, every_s=0.0)
    shown.begin("sums", total=4, drawn=1, graded=0)
    shown._first = time.monotonic() - 10
    for _ in range(3):
        shown.drawn("sums", 100)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sums: 4 samples, 1 of them drawn before"
    assert re.fullmatch(r"sums: 2/4 drawn  right 0/0  10 tokens/s  0:20 left", lines[1]), lines
    assert lines[3].startswith("sums: 4/4 drawn") and "left" not in lines[3]


class Tokenizer:
    chat_template = "x"

    def __init__(self, ends: str) -> None:
        self.ends = ends

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        return f"<user>{conversation[0]['content']}<assistant>{self.ends}"

    def encode(self, text: str, **options: Any) -> list[int]:
        return list(text.encode())


@pytest.mark.parametrize(
    ("ends", "changes", "expected"),
    [
        ("", {}, "<user>q<assistant><think>\n"),
        ("<think>\n", {}, "<user>q<assistant><think>\n"),
        ("", {"force_think": False}, "<user>q<assistant>"),
        ("", {"template": "raw", "force_think": False}, "q"),
    ],
)
def test_the_thinking_is_opened_once(ends: str, changes: dict[str, Any], expected: str) -> None:
    protocol = protocol_of("deepseek", **changes)
    assert rendered(Problem(id="p", prompt="q"), Tokenizer(ends), protocol) == expected


def test_weights_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(9 << 20))
    before = fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("not part of the model")
    assert fingerprint(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(bytes((9 << 20) - 1) + b"\1")
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/model", "--benchmarks", "gsm8k"], "there is no model folder /no/such/model"),
        (["MODEL", "--benchmarks", "gsm8q"], "gsm8k"),
        (["MODEL", "--benchmarks", "gsm8k", "--samples", "0"], "--samples must be >= 1 and <= 10,000, got 0"),
        (["MODEL", "--benchmarks", "gsm8k,gsm8k"], "names gsm8k twice"),
        (["MODEL", "--benchmarks", " , "], "--benchmarks names none"),
        (["MODEL", "--benchmarks", "gsm8k", "--protocol", "gredy"], "greedy"),
        (["MODEL", "--benchmarks", "gsm8k", "--limit", "-1"], "--limit must be >= 0"),
        (["--benchmarks", "gsm8k"], "name a model"),
        (["--benchmarks", "gsm8k", "--endpoint", "http://localhost:1/v1"], "--model NAME"),
        (["MODEL", "--endpoint", "http://localhost:1/v1", "--benchmarks", "gsm8k"], "exclude each other"),
        (["--endpoint", "http://localhost:1/v1"], "--endpoint needs --benchmarks"),
        (["MODEL", "--benchmarks", "gsm8k", "--samples", "10001"], "--samples must be >= 1 and <= 10,000"),
        (["MODEL", "--benchmarks", "gsm8k", "--temperature", "inf"], "temperature must be >= 0 and finite"),
        (
            ["--benchmarks", "gsm8k", "--endpoint", "http://localhost:1/v1", "--model", "m", "--dtype", "bfloat16"],
            "--dtype is for engines",
        ),
        (["MODEL", "--samples", "4"], "--samples is for benchmarks"),
        (["MODEL", "--no-attest", "--recipe", "r1-tiny"], "--no-attest is for benchmarks"),
        (["MODEL", "--benchmarks", "gsm8k", "--recipe", "r1-tiny"], "exclude each other"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(arguments: list[str], words: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    given = [str(tmp_path) if word == "MODEL" else word for word in arguments]
    assert main(["eval", *given, "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("r1: ") and told.count("\n") == 1 and words in told, told
    assert not (tmp_path / "out").exists()
