"""Verdicts, statuses and extracted answers; grading while completions are still drawn; completions of others."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evals.foreign import Reading, as_program, how_to_read, read_foreign, readable
from evals.grading import Grader, extracted, prompt_hash, regraded, ungraded, verdict
from evals.samples import Sample, Status
from rewards.base import RewardConfig
from rewards.code_tests import last_program
from rollout.template import split_reasoning
from rollout.types import Rollout, RolloutGroup
from tests.unit.eval_samples import benchmark, group, problem
from tests.unit.reward_groups import completion, reward

BOMB = r"\boxed{9^{9^{9}}}"
LONG = "\\boxed{" + "1+" * 1500 + "1}"


def graded(config: RewardConfig | str, groups: Sequence[RolloutGroup], **options: Any) -> list[list[Sample]]:
    options = {"forced_think": False, "processes": 1, **options}
    with Grader(benchmark(config), **options) as grader:
        return list(grader.grade(groups))


# --- the verdict, from what a reward function said


def scored(score: float | None = 0.0, error: str = "", **metrics: float) -> Rollout:
    return Rollout(
        completion=completion(), scores={} if score is None or error else {"f": score},
        errors={"f": error} if error else {}, metrics={f"f/{name}": value for name, value in metrics.items()},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rollout", "status", "detail"),
    [
        (scored(1.0), "right", ""),
        (scored(1.0, unparsed=1.0, answered=0.0), "right", ""),  # the score decides
        (scored(0.0), "wrong", ""),
        (scored(0.99), "wrong", "score 0.99"),
        (scored(0.0, answered=0.0), "unanswered", ""),
        (scored(0.0, answered=1.0, refused=1.0), "refused", "refused"),
        (scored(0.0, answered=1.0, gave_up=1.0), "timeout", "gave_up"),
        (scored(0.0, answered=1.0, unparsed=1.0, raised=1.0), "unparsed", "raised"),
        (scored(0.0, answered=1.0, unreadable=1.0), "unparsed", "unreadable"),
        (scored(0.0, answered=1.0, timeout=1.0, tests_passed=0.5), "timeout", "timeout"),
        (
            scored(0.0, answered=1.0, wrong_answer=1.0, tests_passed=0.5),
            "wrong", "wrong_answer, 50% of the tests passed before it",
        ),
        (scored(0.0, answered=1.0, syntax_error=1.0), "wrong", "syntax_error"),
        (scored(None), "error", "f gave no score: it does not apply to this sample"),
        (scored(error="error: KeyError: 'x'"), "error", "error: KeyError: 'x'"),
        (scored(error="crash: gone"), "error", "crash: gone"),
        (scored(error="memory: 3 GiB"), "error", "memory: 3 GiB"),
        (scored(error="invalid: nan"), "error", "invalid: nan"),
        (scored(error="timeout: no result after 10 s"), "timeout", "timeout: no result after 10 s"),
    ],
)  # fmt: skip
def test_verdicts(rollout: Rollout, status: str, detail: str) -> None:
    assert verdict(rollout, RewardConfig(path="m:f")) == (Status(status), detail)


def test_a_late_answer_of_somebody_else_is_not_the_completions_doing() -> None:
    rollout = Rollout(completion=completion(), errors={"judge": "timeout: 30 s"})
    assert verdict(rollout, RewardConfig(path="judge"))[0] is Status.ERROR


@pytest.mark.parametrize(
    ("path", "text", "answer"),
    [
        ("accuracy", "x</think>so \\boxed{4}, no: \\boxed{\\frac12}", r"\frac12"),
        ("accuracy", "x</think>it is 5", None),
        ("accuracy", "x</think>\\boxed{}", None),
        ("accuracy", "x \\boxed{4}", None),  # the thinking never closed
        ("choice", "x</think>The answer is (C).", "C"),
        ("choice", "x</think>The answer is A or B.", "A or B."),
        ("choice", "x</think>I do not know", None),
        ("code_tests", "x</think>\n```python\ny = 1\n```\n", "y = 1\n"),
        ("code_tests", "x</think>y = 1", None),
        ("reasoning_gym", "x</think> 17 \n", "17"),
        ("reasoning_gym", "x</think>so <answer> 17</answer>", "17"),
        ("reasoning_gym", "x</think> ", None),
        ("reasoning_gym", "17", None),
        ("m:f", "x</think>so <answer>a b</answer>", "a b"),
        ("m:f", "x</think>so", None),
    ],
)
def test_extracted_answers(path: str, text: str, answer: str | None) -> None:
    assert extracted(split_reasoning(text), RewardConfig(path=path)) == answer


def test_a_plain_answer_is_extracted_where_the_grader_takes_one() -> None:
    config = RewardConfig(path="accuracy", params={"bare": True})
    assert extracted(split_reasoning("He has 3.\nA: 10", forced_think=False), config) == "10"


# --- with the graders themselves


def test_math_answers_get_their_status_and_everything_about_them() -> None:
    asked = problem(4, "5", groups={"level": 3, "subject": "sums"})
    texts = {
        "t</think>\\boxed{5.0}": ("right", "5.0"), "t</think>\\boxed{6}": ("wrong", "6"),
        "t</think>5": ("unanswered", None), "t \\boxed{5}": ("unanswered", None),
        f"t</think>{BOMB}": ("refused", "9^{9^{9}}"), f"t</think>{LONG}": ("refused", LONG[7:-1]),
        "t</think>\\boxed{\\frac{5}}": ("unparsed", "\\frac{5}"),
    }  # fmt: skip
    [found] = graded("accuracy", [group(asked, list(texts), cut=True)], forced_think=True)
    assert [(each.status.value, each.answer) for each in found] == list(texts.values())
    first = found[0]
    assert (first.benchmark, first.problem, first.doc_id, first.index, first.seed) == ("sums", "p4", 4, 0, 100)
    assert (first.gold, first.score, first.detail, first.finish_reason) == ("5", 1.0, "", "length")
    assert first.tokens == len(first.text) and [each.text for each in found] == list(texts)
    assert first.groups == {"level": "3", "subject": "sums"}
    assert first.prompt_hash == prompt_hash(asked) and len(first.prompt_hash) == 64
    assert [each.index for each in found] == list(range(len(texts)))


def test_a_grader_that_fails_is_no_wrong_answer() -> None:
    texts = ["fine", "raise", "nan", "os._exit", "hang", "fine"]
    config = reward("misbehaves", timeout_s=0.5)
    [found] = graded(config, [group(problem(0), texts)])
    assert [each.status.value for each in found] == ["right", "error", "error", "error", "timeout", "right"]
    assert [each.score for each in found] == [1.0, None, None, None, None, 1.0]
    assert [each.detail.partition(":")[0] for each in found[1:5]] == ["error", "invalid", "crash", "timeout"]
    assert all(each.answer is None for each in found)


def test_even_a_grader_that_always_fails_ends_no_evaluation() -> None:
    found = graded(reward("always_raises"), [group(problem(n), ["\\boxed{1}", "b"]) for n in range(40)])
    assert {each.status for graded_group in found for each in graded_group} == {Status.ERROR}
    assert len(found) == 40 and found[0][0].answer is None, "a text that a grader choked on is not read again"


def test_completions_are_put_in_form_before_they_are_graded_and_kept_as_they_were() -> None:
    def boxes(asked: Any, text: str) -> str:
        return f"\\boxed{{{text.removeprefix('A: ')}}}" if asked.id == "p4" else text

    found = graded("accuracy", [group(problem(4), ["A: 5"]), group(problem(5), ["A: 6"])], as_answer=boxes)
    assert [(s.status.value, s.answer, s.text) for [s] in found] == [
        ("right", "5", "A: 5"),
        ("unanswered", None, "A: 6"),
    ]


def test_a_group_is_graded_while_others_are_drawn() -> None:
    seen = threading.Event()
    drawn = 0

    def drawing() -> Iterator[RolloutGroup]:
        nonlocal drawn
        until = time.monotonic() + 30
        while not seen.is_set():
            assert time.monotonic() < until, "the first verdict must not wait for the last completion"
            yield group(problem(drawn), ["a"])
            drawn += 1
            time.sleep(0.02)

    with Grader(benchmark(reward("length")), forced_think=False, processes=1) as grader:
        order = []
        for [each] in grader.grade(drawing()):
            order.append(each.problem)
            seen.set()
    assert order == [f"p{number}" for number in range(drawn)]


def test_what_a_grader_lacks_is_said_before_anything_is_graded() -> None:
    with Grader(benchmark(RewardConfig(path="no_such:thing")), forced_think=False) as grader:
        with pytest.raises(ValueError, match="no module 'no_such'"):
            grader.ready(60)
        with pytest.raises(ValueError, match="no module 'no_such'"):
            grader.check([])
    with Grader(benchmark("choice"), forced_think=False) as grader, pytest.raises(ValueError, match="problem 'p1'"):
        grader.check([problem(0, "A"), problem(1, "?!")])


def test_graded_again_the_same_samples_get_the_verdicts_of_the_new_grader() -> None:
    asked = {each.id: each for each in (problem(0), problem(1))}
    [first], [second, third] = graded(
        reward("misbehaves"), [group(asked["p0"], ["fine"]), group(asked["p1"], ["a", "raise"])]
    )
    mixed = [third, first, second]
    with Grader(benchmark(reward("length")), forced_think=False, processes=1) as grader:
        again = regraded(grader, asked, mixed)
        assert [each.key for each in again] == [each.key for each in mixed]
        assert [each.score for each in again] == [5.0, 4.0, 1.0], "as many tokens as it had"
        for each, was in zip(again, mixed, strict=True):
            assert each.text == was.text and each.seed == was.seed and each.prompt_hash == was.prompt_hash
        with pytest.raises(ValueError, match="sums has no problem 'p1'"):
            regraded(grader, {"p0": asked["p0"]}, mixed)
        with pytest.raises(ValueError, match="'p1' reads otherwise than when its samples were drawn"):
            regraded(grader, {**asked, "p1": replace(problem(1), prompt="How much is 1 + 1?")}, mixed)
    rollouts = ungraded(asked["p1"], [second, third]).rollouts
    assert [rollout.completion.sample_index for rollout in rollouts] == [0, 1]


# --- completions that others made

PROBLEMS = [
    problem(0), problem(1), problem(2, task_id="Sums/2"),
    problem(3, task_id="Sums/3", entry_point="add", prompt='def add(a):\n    """Adds one."""\n'),
]  # fmt: skip


def write(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def texts_of(groups: Sequence[RolloutGroup]) -> dict[str, list[str]]:
    return {each.problem.id: [rollout.completion.text for rollout in each.rollouts] for each in groups}


def test_rows_find_their_problem_by_any_name(tmp_path: Path) -> None:
    rows = [
        {"task_id": "Sums/2", "completion": "a"}, {"problem": "p1", "text": "b"},
        {"doc_id": 0, "resps": [["c", "d"], ["e"]]}, {"question": "What is  1 + 1?\n", "response": "f"},
        {"problem": "What is 0 + 1?", "solution": "g"}, "",
        {"task_id": 2, "completion": "h"}, {"task_id": "Other/3", "solution": "i"},
        {"doc_id": 1, "doc": {"question": "What is 1 + 1?"}, "resps": ["j"], "target": "2"},
        {"problem": "p1", "question": "What is 1 + 1?", "completion": "k", "gold": "9"},
    ]  # fmt: skip
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        groups = read_foreign(write(tmp_path / name, rows), PROBLEMS)
        assert texts_of(groups) == {
            "p2": ["a", "h"],
            "p1": ["b", "f", "j", "k"],
            "p0": ["c", "d", "e", "g"],
            "p3": ["i"],
        }
    assert groups[1].problem.answer == "2", "the benchmark's gold answer, not the row's"
    assert [r.completion.sample_index for r in groups[2].rollouts] == [0, 1, 2, 3]


def test_the_rows_of_several_filters_hold_the_same_completions(tmp_path: Path) -> None:
    rows = [{"doc_id": n, "resps": [[f"{n}", "x"]], "filter": name} for name in ("strict", "last") for n in (0, 1)]
    rows.append({"doc_id": 1, "resps": [["more"]], "filter": "strict"})
    groups = read_foreign(write(tmp_path / "rows.jsonl", rows), PROBLEMS)
    assert texts_of(groups) == {"p0": ["0", "x"], "p1": ["1", "x", "more"]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"task_id": "Sums/9", "completion": "a"}, "row 2: task_id 'Sums/9' matches no problem of this benchmark"),
        ({"doc_id": 7, "completion": "a"}, "row 2: doc_id 7 matches no problem"),
        ({"question": "What?", "completion": "a"}, r"row 2: question 'What\?' matches no problem"),
        ({"doc_id": 1, "problem": "p2", "completion": "a"}, "row 2: problem is problem 'p2', but doc_id is 'p1'"),
        (
            {"doc_id": 1, "doc": {"question": "What is 2 + 1?"}, "resps": ["a"]},
            "doc_id is problem 'p1', but doc is 'p2'",
        ),
        ({"completion": "a"}, "row 2 names no problem: it needs one of task_id, problem, doc_id, question"),
        ({"doc_id": 1}, "row 2 has no text: it needs one of completion, response, text, resps, solution"),
        ({"doc_id": 1, "text": 5}, "row 2: text must hold texts, got 5"),
        ({"doc_id": 1, "resps": []}, "row 2: resps is empty"),
        ("[1]", r"row 2: a row is a JSON object, got \[1\]"),
        ("{", "row 2: no JSON"),
    ],
)
def test_the_first_row_that_cannot_be_used_is_named(tmp_path: Path, row: Any, said: str) -> None:
    path = write(tmp_path / "x.jsonl", [{"doc_id": 0, "text": "a"}, row, {"doc_id": 99}])
    with pytest.raises(ValueError, match=said) as caught:
        read_foreign(path, PROBLEMS)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_foreign(tmp_path / "none.jsonl", PROBLEMS)
    with pytest.raises(ValueError, match="is empty: it needs one JSON object per line"):
        read_foreign(write(tmp_path / "empty.jsonl", [""]), PROBLEMS)
    torn = write(tmp_path / "torn.jsonl.gz", [{"doc_id": 0, "text": "a"}] * 50)
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"torn.jsonl.gz is damaged after row"):
        read_foreign(torn, PROBLEMS)


def test_rows_with_their_own_gold_are_problems_of_their_own(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "gold": "3", "prediction": "3", "kind": "answer"}, {"id": "a", "gold": "4", "completion": "so 4"},
        {"gold": "5", "prediction": "whole \\boxed{5}", "kind": "completion"},
    ]  # fmt: skip
    groups = read_foreign(write(tmp_path / "x.jsonl", rows), PROBLEMS)
    assert texts_of(groups) == {"a": ["\\boxed{3}"], "a (row 2)": ["so 4"], "row 3": ["whole \\boxed{5}"]}
    assert [each.problem.answer for each in groups] == ["3", "4", "5"]


def test_how_a_file_wants_to_be_read() -> None:
    def reading(*texts: str) -> Reading:
        return how_to_read([group(problem(0), texts)])

    assert reading("A: 5", "7") == Reading(forced_think=False, plain=True)
    assert reading("A: 5", "so \\boxed{7}") == Reading(forced_think=False, plain=False)
    assert reading("<think>x</think>7 <answer>8</answer>") == Reading(forced_think=False, plain=False)
    assert reading("cut", "x</think>\\boxed{7}") == Reading(forced_think=True, plain=False)
    plain = Reading(forced_think=False, plain=True)
    assert readable(benchmark("accuracy"), plain).grader.params == {"bare": True}
    assert readable(benchmark("choice"), plain) == benchmark("choice")
    assert readable(benchmark("accuracy"), Reading(forced_think=False, plain=False)) == benchmark("accuracy")
    told = benchmark(RewardConfig(path="accuracy", params={"bare": False}))
    assert readable(told, plain) == told


def test_code_becomes_a_program() -> None:
    asked, other = PROBLEMS[3], PROBLEMS[0]

    def program(of: Any, text: str) -> str | None:
        return last_program(split_reasoning(as_program(of, text), forced_think=False))

    start = asked.metadata["prompt"]
    assert program(asked, "    return a + 1\n") == f"{start}    return a + 1\n\n"
    whole = "def add(a):\n    return a + 1"
    assert program(asked, whole) == f"{whole}\n"
    assert program(asked, f"t</think>{whole}") == f"{whole}\n"
    assert program(asked, f"Here:\n```python\n{whole}\n```\n") == f"{whole}\n"
    assert program(other, "x = '```'\ny = 2") == "x = '```'\ny = 2\n"
    assert as_program(asked, "t</think> ") == "t</think> " and program(asked, "") is None


# --- OpenAI's own completions of GSM8K


@pytest.fixture(scope="module")
def openai_rows(data_folder: Path) -> Path:
    path = data_folder.parent / "cases" / "math_answers" / "real_gsm8k_openai.jsonl.gz"
    if not path.exists():
        pytest.skip(f"there is no {path.name} beside the benchmark data")
    return path


def test_openai_completions_of_gsm8k_get_the_verdicts_that_openai_gave_them(openai_rows: Path) -> None:
    with gzip.open(openai_rows, "rt") as file:
        labels = {row["id"]: row["expected"] for row in map(json.loads, file)}
    groups = read_foreign(openai_rows, [])
    reading = how_to_read(groups)
    with Grader(readable(benchmark(), reading), forced_think=reading.forced_think) as grader:
        found = {each.problem: each.status is Status.RIGHT for [each] in grader.grade(groups)}
    assert reading.plain and len(found) == 1500
    assert found == labels and sum(found.values()) == 588
