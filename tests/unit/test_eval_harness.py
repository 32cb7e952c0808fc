"""Our figures and files against lm-evaluation-harness on the same samples.

The numbers below are what lm-eval 0.4.13 printed: a task of 40 questions in a local JSON file, a model that answers
with the texts of :func:`text`, the regex filter, and exact_match. Where the variable R1_LM_EVAL names a Python that has
lm-eval (an environment of its own: its requirements are not ours), it is asked again.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from evals.export import LmEvalTask, lm_eval_results, lm_eval_rows
from evals.foreign import read_foreign
from evals.grading import Grader
from evals.samples import Sample
from evals.summary import summarise
from rollout.types import Problem, SamplingParams
from tests.unit.eval_samples import benchmark, group

PROBLEMS, SAMPLES = 40, 8
BY_SAMPLE = {  # sample -> exact_match and its stderr, a run of one sample per question
    0: (0.45, 0.07966275068156915), 1: (0.475, 0.07996393417804533), 2: (0.475, 0.07996393417804533),
    3: (0.45, 0.07966275068156915), 4: (0.45, 0.07966275068156915), 5: (0.5, 0.08006407690254357),
    6: (0.475, 0.07996393417804533), 7: (0.475, 0.07996393417804533),
}  # fmt: skip
MAJORITY = {8: (0.5, 0.08006407690254357), 4: (0.475, 0.07996393417804533)}  # majority_vote of the first 8 and 4
HASHES = {  # of the first question's row
    "doc_hash": "e8e270bcb37244d6310a892e711608756519cde68ee410f79ecade8683565a7d",
    "prompt_hash": "84cc0bee238a4b44dcf12998a3f2629e46b83d1d263f60a2474e8dff4a920faa",
    "target_hash": "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b",
}

HARNESS = r"""
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[1])
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

texts = json.loads((folder / "texts.json").read_text())

class Fixed(LM):
    def __init__(self, start):
        super().__init__()
        self.given = {question: iter(answers[start:]) for question, answers in texts.items()}

    def generate_until(self, requests, disable_tqdm=False):
        return [next(self.given[request.args[0]]) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood

tasks = TaskManager(include_path=str(folder), include_defaults=False)

def run(task, start, **options):
    return simple_evaluate(model=Fixed(start), tasks=[task], task_manager=tasks, **options)

found = {"one": [run("one", start)["results"]["one"] for start in range(8)]}
many = run("many", 0, log_samples=True)
found["many"] = many["results"]["many"]
samples = many.pop("samples")
tracker = EvaluationTracker(output_path=str(folder / "out"))
tracker.general_config_tracker.log_experiment_args("fixed", "pretrained=fixed", "", "", False)
tracker.save_results_aggregated(many, samples)
tracker.save_results_samples("many", samples["many"])
(folder / "found.json").write_text(json.dumps(found, default=float))
"""

TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/test.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
repeats: REPEATS
generation_kwargs: {until: [zzz], do_sample: true, temperature: 0.6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
filter_list:
"""
BOXED = r"{function: regex, regex_pattern: '\\boxed\{([^}]*)\}'}"


def gold(i: int) -> int:
    return i * 7 % 23 + 1


def text(i: int, j: int) -> str:
    """Sample j of question i."""
    if (5 * i + 3 * j) % 8 < i % 9:
        return f"so \\boxed{{{gold(i)}}}"
    if (i + j) % 7 == 0:
        return "I do not know"
    return f"\\boxed{{{gold(i) + 1 + i * j % 3}}}"


def row(i: int) -> dict[str, str]:
    return {"question": f"Number {i}?", "answer": str(gold(i))}


def asked(i: int) -> Problem:
    question, answer = row(i).values()
    metadata = {**row(i), "doc_id": i, "groups": {}}
    return Problem(id=f"n/{i}", prompt=question, answer=answer, source="sums", metadata=metadata)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    groups = [group(asked(i), [text(i, j) for j in range(SAMPLES)]) for i in range(PROBLEMS)]
    with Grader(benchmark(), forced_think=False, processes=1) as grader:
        return [each for graded in grader.grade(groups) for each in graded]


def test_pass_at_1_and_its_error_are_the_harness_s_exact_match(samples: list[Sample]) -> None:
    for j, (value, error) in BY_SAMPLE.items():
        found = summarise(benchmark(), [each for each in samples if each.index == j], problems=PROBLEMS)
        assert found["pass_at_1"] == pytest.approx(value, abs=1e-15) and found["se"] == pytest.approx(error, rel=1e-12)
    every = summarise(benchmark(), samples, problems=PROBLEMS)
    assert every["pass_at_1"] == pytest.approx(fmean(value for value, _ in BY_SAMPLE.values()), abs=1e-15)
    assert every["k"] == 8 and every["shares"]["unanswered"] > 0


def test_majorities_are_the_harness_s_majority_vote(samples: list[Sample]) -> None:
    for k, (value, _) in MAJORITY.items():
        found = summarise(benchmark(), [each for each in samples if each.index < k], problems=PROBLEMS)
        assert found["maj"]["value"] == pytest.approx(value, abs=1e-15)


def test_rows_have_the_harness_s_hashes(samples: list[Sample]) -> None:
    task = LmEvalTask(
        benchmark=benchmark(), problems={f"n/{i}": asked(i) for i in range(PROBLEMS)}, num_fewshot=0,
        sampling=SamplingParams(temperature=0.6, stop=("zzz",)),
    )  # fmt: skip
    rows = list(lm_eval_rows(task, samples))
    assert len(rows) == PROBLEMS and {key: rows[0][key] for key in HASHES} == HASHES


# --- with the harness itself


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    python = os.environ.get("R1_LM_EVAL")
    if not python:
        pytest.skip("R1_LM_EVAL names no Python with lm-eval")
    folder = tmp_path_factory.mktemp("harness")
    (folder / "test.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(PROBLEMS)))
    texts = {row(i)["question"]: [text(i, j) for j in range(SAMPLES)] for i in range(PROBLEMS)}
    (folder / "texts.json").write_text(json.dumps(texts))
    first = "  - {name: first, filter: [BOXED, {function: take_first}]}\n"
    votes = "  - {name: maj8, filter: [BOXED, {function: majority_vote}, {function: take_first}]}\n"
    four = votes.replace("maj8", "maj4").replace("BOXED", "{function: take_first_k, k: 4}, BOXED")
    for name, repeats, filters in (("one", 1, first), ("many", SAMPLES, first + votes + four)):
        written = TASK.replace("NAME", name).replace("FOLDER", str(folder)).replace("REPEATS", str(repeats)) + filters
        (folder / f"{name}.yaml").write_text(written.replace("BOXED", BOXED))
    done = subprocess.run([python, "-c", HARNESS, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    yield folder, json.loads((folder / "found.json").read_text())


def test_the_harness_still_says_so(harness: tuple[Path, dict[str, Any]]) -> None:
    _, found = harness
    for j, (value, error) in BY_SAMPLE.items():
        assert found["one"][j]["exact_match,first"] == pytest.approx(value, abs=1e-15)
        assert found["one"][j]["exact_match_stderr,first"] == pytest.approx(error, rel=1e-12)
    for k, (value, error) in MAJORITY.items():
        assert found["many"][f"exact_match,maj{k}"] == pytest.approx(value, abs=1e-15)
        assert found["many"][f"exact_match_stderr,maj{k}"] == pytest.approx(error, rel=1e-12)


def test_the_harness_s_files_are_read_and_ours_look_like_them(
    harness: tuple[Path, dict[str, Any]], samples: list[Sample]
) -> None:
    folder, _ = harness
    [logged], [results] = folder.glob("out/*/samples_many_*.jsonl"), folder.glob("out/*/results_*.json")
    problems = {f"n/{i}": asked(i) for i in range(PROBLEMS)}
    theirs = [json.loads(line) for line in logged.read_text().splitlines()]
    once = [each for each in theirs if each["filter"] == "first"]
    assert len(theirs) == 3 * len(once), "a row per question and filter"
    groups = read_foreign(logged, list(problems.values()))
    assert [each.problem.id for each in groups] == list(problems)
    read = [[rollout.completion.text for rollout in each.rollouts] for each in groups]
    assert read == [[text(i, j) for j in range(SAMPLES)] for i in range(PROBLEMS)]
    task = LmEvalTask(
        benchmark=benchmark(), problems=problems, num_fewshot=0,
        sampling=SamplingParams(temperature=0.6, stop=("zzz",)),
    )  # fmt: skip
    for mine, other in zip(lm_eval_rows(task, samples), once, strict=True):
        assert set(mine) == set(other)
        same = ("doc_id", "doc", "target", "resps", "doc_hash", "prompt_hash", "target_hash", "metrics")
        assert {key: mine[key] for key in same} == {key: other[key] for key in same}
        assert mine["arguments"]["gen_args_0"].keys() == other["arguments"]["gen_args_0"].keys()
    summary = {"results": {"many": summarise(benchmark(), samples, problems=PROBLEMS)}, "model": "m", "seed": 0}
    ours, given = lm_eval_results({"many": task}, summary), json.loads(results.read_text())
    assert set(ours) <= set(given)
    for key in ("n-samples", "n-shot", "higher_is_better"):
        assert ours[key].keys() == given[key].keys(), key
    assert ours["n-samples"] == given["n-samples"]
