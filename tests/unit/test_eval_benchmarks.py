"""Benchmarks: the catalogue, and a user's own file."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

import evals.benchmark
from evals.benchmark import Benchmark, DataFile, find_benchmark, known
from evals.benchmark_data import as_answer, load_benchmark
from evals.benchmark_yaml import REFUSED, TOLD
from evals.protocol import PROTOCOLS
from rewards.accuracy import accuracy
from rollout.template import split_reasoning
from rollout.types import Problem

BASE, CHAT = PROTOCOLS["few-shot"], PROTOCOLS["deepseek"]
FEW_LINES = "data_file: mine.jsonl\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
ROWS = '{"question": "1+1?", "answer": "2"}\n{"question": "2+2?", "answer": "4"}\n'


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# --- the catalogue


def test_the_catalogue_is_complete():
    assert known() == [
        "aime24", "aime25", "amc23", "gpqa_diamond", "gsm8k", "humaneval", "humaneval_plus", "livecodebench", "math",
        "math500", "mbpp", "mbpp_plus", "olympiadbench",
    ]  # fmt: skip


@pytest.mark.parametrize("name", known())
def test_every_shipped_benchmark_says_what_it_is(name):
    benchmark = find_benchmark(name)
    assert (benchmark.name, benchmark.folder) == (name, "")
    assert benchmark.about.endswith(".") and benchmark.version
    assert benchmark.data is not None and "/" in benchmark.data.file
    assert benchmark.dataset_path or benchmark.origin, "where would a user get it?"
    assert benchmark.instruction and benchmark.until
    assert len(benchmark.fewshot) >= benchmark.num_fewshot
    assert all(example["question"] and example["target"] for example in benchmark.fewshot)
    checked = {"accuracy": "boxed{}", "choice": "boxed{}", "code_tests": "```python"}
    assert checked[benchmark.grader.path] in benchmark.instruction
    if benchmark.grader.path == "code_tests":
        assert benchmark.grader.timeout_s > benchmark.grader.params["total_s"] + 1
        assert "reference" not in benchmark.process_docs


def test_samples_per_problem_are_deepseeks():
    asked = {name: find_benchmark(name).repeats for name in known()}
    deepseek = {"aime24": 64, "aime25": 64, "gpqa_diamond": 64, "math500": 16, "livecodebench": 8}
    assert asked.items() >= deepseek.items()
    assert all(k >= 4 for k in asked.values())


def test_steps_of_the_gsm8k_examples_add_up():
    benchmark, steps = find_benchmark("gsm8k"), 0
    for example in benchmark.fewshot:
        for left, right in re.findall(r"(?<![\w+])(\d+(?: [*/+-] \d+)+) = (\d+)", example["target"]):
            assert eval(left) == int(right), left
            steps += 1
        last = re.findall(r"\d+(?= |\.|\n|$)", example["target"].partition("####")[0])
        assert example["target"].rpartition("#### ")[2] in last
    assert steps >= 20


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("gsm8k", ["11", "168", "12", "31", "9", "24", "40", "4"]),
        ("math", ["225", "3", "3/4", r"\frac{\sqrt6-\sqrt2}{4}", "4", "60"]),
    ],
)
def test_the_examples_are_right_as_a_base_model_would_write_them(name, answers):
    benchmark = find_benchmark(name)
    assert len(benchmark.fewshot) == len(answers)
    for example, answer in zip(benchmark.fewshot, answers, strict=True):
        problem = Problem(id="1", prompt=example["question"], answer=answer)
        text = as_answer(benchmark, BASE, problem, f" {example['target']}\n\n{benchmark.until[0].strip()} What …")
        assert accuracy(problem, split_reasoning(text, forced_think=False)).value == 1.0, example["question"]


def test_the_mbpp_examples_pass_their_own_tests():
    benchmark = find_benchmark("mbpp")
    for example in benchmark.fewshot:
        names: dict = {}
        exec(example["target"], names)
        asserts = [line for line in example["question"].splitlines() if line.startswith("assert ")]
        assert len(asserts) == 3
        for statement in asserts:
            exec(statement, names)


def test_unknown_names_name_the_nearest(monkeypatch):
    monkeypatch.setattr(evals.benchmark, "_gym_names", lambda name: ["chain_sum", "basic_arithmetic"])
    for name, message in {
        "gsm8": "there is no benchmark 'gsm8'; did you mean 'gsm8k'?",
        "MATH-500": "did you mean 'math500'?",
        "zzz": "there are aime24, aime25",
        "reasoning_gym:chain_sums": "no data set 'chain_sums'; did you mean 'chain_sum'?",
        "nowhere/gsm8k.yaml": "there is no benchmark file nowhere/gsm8k.yaml .* the shipped one is called gsm8k",
        "nowhere/my.py": "there is no benchmark file nowhere/my.py",
    }.items():
        with pytest.raises(ValueError, match=message.replace("?", r"\?")) as caught:
            find_benchmark(name)
        assert "\n" not in str(caught.value)


def test_reasoning_gym_is_made_in_code():
    benchmark = find_benchmark("reasoning_gym:chain_sum")
    assert benchmark.name == "reasoning_gym:chain_sum" and benchmark.data is None
    assert (benchmark.grader.path, benchmark.grader.params) == ("reasoning_gym", {"strict": True})
    assert "<answer>" in benchmark.instruction


# --- a user's own file


def test_a_few_lines_make_a_benchmark(tmp_path):
    written(tmp_path, ROWS, "mine.jsonl")
    benchmark = find_benchmark(written(tmp_path, FEW_LINES))
    assert (benchmark.name, benchmark.version, benchmark.grader.path, benchmark.repeats) == ("mine", "0", "accuracy", 1)
    data = load_benchmark(benchmark, protocol=CHAT)
    assert [(p.id, p.prompt, p.answer) for p in data.problems] == [("mine/0", "1+1?", "2"), ("mine/1", "2+2?", "4")]
    assert data.files[0]["file"] == "mine.jsonl" and data.files[0]["rows"] == 2


HARNESS = """
task: sums
task_alias: Sums
tag: [arithmetic]
dataset_path: json
dataset_name: null
output_type: generate_until
training_split: train
validation_split: validation
test_split: null
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{answer.split('#')[-1].strip() if answer is defined else target}}"
description: "Add.\\n\\n"
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: strict, filter: [{function: regex, regex_pattern: "x"}]}
generation_kwargs: {until: ["Q:", "</s>"], do_sample: false, temperature: 0.0}
repeats: 3
num_fewshot: 1
fewshot_config:
  sampler: first_n
  samples:
    - {question: "0+1?", target: "one"}
metadata: {version: 2.0}
"""


def test_the_keys_of_lm_evaluation_harness(tmp_path, caplog):
    """A file of that tool, used by one that adds a grader and the data."""
    written(tmp_path, HARNESS, "sums.yaml")
    written(tmp_path, '{"question": "1+1?", "answer": "so # 2"}\n', "sums.jsonl")
    with caplog.at_level(logging.WARNING):
        benchmark = find_benchmark(written(tmp_path, "include: sums.yaml\ndata_file: sums.jsonl\ngrader: accuracy\n"))
    assert (benchmark.name, benchmark.version, benchmark.test_split) == ("mine", "2.0", "validation")
    assert (benchmark.until, benchmark.repeats, benchmark.num_fewshot) == (("Q:", "</s>"), 3, 1)
    [told] = [record.getMessage() for record in caplog.records]
    for key in ("task_alias", "tag", "training_split", "metric_list", "filter_list", "generation_kwargs.do_sample"):
        assert key in told
    assert "until" not in told and "\n" not in told
    data = load_benchmark(benchmark, protocol=BASE)
    assert data.problems[0].prompt == "Add.\n\nQ: 0+1?\nA: one\n\nQ: 1+1?\nA:"
    assert data.problems[0].answer == "2"


def test_functions_of_lm_evaluation_harness(tmp_path):
    code = """
def process_docs(dataset):
    return dataset.filter(lambda doc: doc["keep"]).map(lambda doc: {"gold": str(doc["a"] + doc["b"])})
def text(doc):
    return f"{doc['a']}+{doc['b']}?"
def samples():
    return [{"a": 0, "b": 1, "target": "1"}]
"""
    written(tmp_path, code, "tools.py")
    written(tmp_path, '{"a": 1, "b": 2, "keep": false}\n{"a": 3, "b": 4, "keep": true}\n', "mine.jsonl")
    keys = (
        "data_file: mine.jsonl\nprocess_docs: !function tools.process_docs\ndoc_to_text: !function tools.text\n"
        "doc_to_target: gold\nnum_fewshot: 1\nfewshot_config: {samples: !function tools.samples}\n"
    )
    data = load_benchmark(find_benchmark(written(tmp_path, keys)), protocol=BASE)
    assert [(p.prompt, p.answer) for p in data.problems] == [("0+1? 1\n\n3+4?", "7")]


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_keys_that_change_what_is_measured_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match=f"mine.yaml: {key} of lm-evaluation-harness is not taken: ") as caught:
        find_benchmark(written(tmp_path, f"{FEW_LINES}{key}: x\n"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("output_type: multiple_choice", "output_type multiple_choice of lm-evaluation-harness is not taken"),
        ("metric_list: [{metric: acc}]", "metric_list .* write grader: accuracy"),
        ("doc_to_txt: x", "unknown key 'doc_to_txt'; did you mean 'doc_to_text'?"),
        ("repeats: many", "repeats must be a whole number, got 'many'"),
        ("repeats: true", "repeats must be a whole number, got True"),
        ("repeats: 0", "repeats must be >= 1, got 0"),
        ("group_by: [1]", "group_by must be a text or a list of texts, got a list"),
        ("task: a/b", "the name of a benchmark is made of letters, digits"),
        ("task: [a, b]", "task must be a text, got a list"),
        ("grader: {path: accuracy, timeout: 3}", "grader has no 'timeout'; did you mean 'timeout_s'?"),
        ("grader: {timeout_s: 3}", "grader needs path"),
        ("grader: exact", "reward path must be accuracy, choice"),
        ("grader: {path: accuracy, timeout_s: soon}", "grader: "),
        ("fewshot_config: {samples: 3}", "samples must be a list of mappings"),
        ("fewshot_config: {fewshot_indices: [1]}", "fewshot_config.fewshot_indices is not taken"),
        ("generation_kwargs: {until: 3}", "generation_kwargs.until must be a text or a list of texts, got 3"),
        ("sha256: abc", "sha256 must be 64 hex digits"),
        ("answer_prefix: '('", "answer_prefix is no regular expression"),
        ("doc_id: '{{id'", "doc_id is no jinja2 template: line 1"),
        ("process_docs: nothing", "a function is written module:function or file.py:function"),
        ("process_docs: no_such_module_x:f", "the module no_such_module_x cannot be imported"),
        ("process_docs: evals.code_sets:nope", "evals.code_sets has no 'nope'"),
        ("process_docs: none.py:f", "the file none.py is not there"),
        ("include: gsm8", "there is no gsm8 beside it, nor a benchmark of that name; did you mean 'gsm8k'?"),
        ("include: mine.yaml", "a file includes itself"),
        ("a: b: c", "mine.yaml:4: this is not valid YAML"),
        ("doc_to_text: twice", "'doc_to_text' is written twice"),
        ("doc_id: *nowhere", "not valid YAML: .*undefined alias"),
        ("[1, 2]", "not valid YAML"),
        ("3: x", "a benchmark is a mapping of keys to values"),
    ],
)
def test_a_broken_file_ends_in_one_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as caught:
        find_benchmark(written(tmp_path, f"{FEW_LINES}{lines}\n"))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a benchmark is a mapping"),
        ("- a\n", "a benchmark is a mapping"),
        ("doc_to_text: q\ndoc_to_target: a\n", "there are no data: write data_file, dataset_path or custom_dataset"),
        ("data_file: x\ndoc_to_text: q\n", "the grader accuracy compares with a gold answer: write doc_to_target"),
        ("data_file: x\ndoc_to_target: a\n", "doc_to_text is empty"),
        ("dataset_path: x\ndoc_to_text: q\ndoc_to_target: a\nrows: 3\n", "rows and sha256 are of a local file"),
    ],
)
def test_what_a_file_must_say(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        find_benchmark(written(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"task: \xff\xfe")
    with pytest.raises(ValueError, match=r"mine\.yaml cannot be read"):
        find_benchmark(path)


def test_what_is_included_keeps_its_name_to_itself(tmp_path):
    benchmark = find_benchmark(written(tmp_path, "include: gsm8k\nrepeats: 2\n", "gsm8k_twice.yaml"))
    shipped = find_benchmark("gsm8k")
    assert benchmark == replace(shipped, name="gsm8k_twice", repeats=2, folder=str(tmp_path))
    assert find_benchmark(written(tmp_path, "include: gsm8k\ntask: other\n")).name == "other"


def test_a_grader_beside_the_file_is_found_from_anywhere(tmp_path, monkeypatch):
    written(tmp_path, "def exact(completion, problem):\n    return 1.0\n", "my_grader.py")
    monkeypatch.chdir("/")
    for grader in ("my_grader.py:exact", "my_grader:exact"):
        benchmark = find_benchmark(written(tmp_path, f"{FEW_LINES}grader: {{path: {grader}}}\n"))
        assert benchmark.grader.path == f"{tmp_path}/my_grader.py:exact"
        assert benchmark.grader.name == "exact"


def test_a_python_file_where_yaml_is_not_enough(tmp_path):
    code = """
from dataclasses import replace
from evals.benchmark import find_benchmark

def rows(**options):
    return {"test": [{"q": f"{n}+{n}?", "a": str(2 * n)} for n in range(options["count"])]}

BENCHMARK = {"custom_dataset": "mine.py:rows", "dataset_kwargs": {"count": 3}, "doc_to_text": "q", "doc_to_target": "a"}

def twice():
    return replace(find_benchmark("gsm8k"), name="twice")

NUMBER = 3
"""
    path = written(tmp_path, code, "mine.py")
    data = load_benchmark(find_benchmark(path), protocol=CHAT)
    assert [(p.prompt, p.answer) for p in data.problems] == [("0+0?", "0"), ("1+1?", "2"), ("2+2?", "4")]
    assert data.files[0]["file"] == "mine.py:rows" and len(data.files[0]["sha256"]) == 64
    assert find_benchmark(f"{path}:twice").name == "twice"
    for name, message in {
        ":thrice": "has no thrice; did you mean 'twice'",
        ":NUMBER": "must be a Benchmark or a dict of its keys, got a int",
        ":rows": "failed: KeyError",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_benchmark(f"{path}{name}")
    with pytest.raises(ValueError, match="cannot be imported: SyntaxError"):
        find_benchmark(written(tmp_path, "def (", "broken.py"))


def test_fields_are_checked_whoever_makes_a_benchmark():
    with pytest.raises(ValueError, match=r"a stop string .* is empty"):
        Benchmark(name="x", version="1", doc_to_text="q", doc_to_target="a", data=DataFile(file="f"), until=("",))
    with pytest.raises(ValueError, match="rows must be >= 0"):
        DataFile(file="f", rows=-1)


def test_the_page_lists_every_key():
    page = (Path(__file__).parents[2] / "docs" / "evals" / "benchmarks.md").read_text()
    for key in (*TOLD, *REFUSED, "metric_list", "filter_list", *known()):
        assert f"`{key}`" in page, key
