"""Data of benchmarks: where they are found, how they are verified, and what problems they become."""

import gzip
import hashlib
import json
import socket
from pathlib import Path

import pytest

import evals.data_files
from evals.benchmark import Benchmark, DataFile, find_benchmark, known
from evals.benchmark_data import load_benchmark
from evals.protocol import PROTOCOLS, protocol_of

BASE, CHAT = PROTOCOLS["few-shot"], PROTOCOLS["deepseek"]
ROWS = [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}]


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("R1_DATA", raising=False)


@pytest.fixture
def no_hub(monkeypatch):
    """The hub answers that it has nothing."""

    def refused(source, params):
        if source.startswith("hf:"):
            raise ValueError(
                "cannot load the data set x (split test): nobody answers.\nWithout a network give a folder"
            )
        return real(source, params)

    real = evals.data_files.read_rows
    monkeypatch.setattr(evals.data_files, "read_rows", refused)
    monkeypatch.setattr(evals.data_files, "_reachable", lambda endpoint: False)


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def sums(**changes) -> Benchmark:
    given = {
        "name": "sums", "version": "1", "data": DataFile(file="sums/test.jsonl"), "dataset_path": "someone/sums",
        "doc_to_text": "{{question}}", "doc_to_target": "answer", **changes,
    }  # fmt: skip
    return Benchmark(**given)


def put(folder: Path, rows=ROWS, name: str = "sums/test.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = rows if isinstance(rows, bytes) else lines(rows)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def loaded(folder: Path | None, benchmark: Benchmark | None = None, **options):
    return load_benchmark(benchmark or sums(), protocol=options.pop("protocol", CHAT), data_dir=folder, **options)


# --- where


def test_the_named_folder_goes_before_the_variable(tmp_path, monkeypatch, no_hub):
    put(tmp_path / "named", ROWS[:1])
    put(tmp_path / "variable")
    monkeypatch.setenv("R1_DATA", str(tmp_path / "variable"))
    assert len(loaded(tmp_path / "named").problems) == 1
    assert len(loaded(None).problems) == 2
    (tmp_path / "empty").mkdir()
    assert len(loaded(tmp_path / "empty").problems) == 2
    with pytest.raises(ValueError, match=r"the data folder names .*nowhere, which is no folder"):
        loaded(tmp_path / "nowhere")
    monkeypatch.setenv("R1_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"R1_DATA names .*nowhere, which is no folder"):
        loaded(None)


@pytest.mark.parametrize("name", ["sums/test.jsonl", "sums/test.jsonl.gz", "other.json", "sums.csv"])
def test_a_file_may_have_other_names(tmp_path, name):
    content = {"other.json": json.dumps(ROWS).encode(), "sums.csv": b"question,answer\n1+1?,2\n2+2?,4\n"}
    path = put(tmp_path, content.get(name, ROWS), name)
    data = loaded(tmp_path, sums(data=DataFile(file="sums/test.jsonl.gz", also=("other.json", "sums.csv"), rows=2)))
    assert [problem.answer for problem in data.problems] == ["2", "4"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.files == [{"file": name, "rows": 2, "sha256": digest}]


def test_parquet_and_the_hub(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert len(loaded(tmp_path, sums(data=DataFile(file="rows.parquet"))).problems) == 2
    asked = []

    def answered(source, params):
        asked.append((source, params))
        return ((f"row {n}", row) for n, row in enumerate(ROWS))

    monkeypatch.setattr(evals.data_files, "read_rows", answered)
    monkeypatch.setattr(evals.data_files, "_reachable", lambda endpoint: True)
    benchmark = sums(dataset_name="main", test_split="dev", dataset_kwargs={"revision": "abc"})
    data = loaded(None, benchmark)
    assert asked == [("hf:someone/sums:dev", {"name": "main", "revision": "abc"})]
    assert data.files[0]["file"] == "hub:someone/sums:main:dev" and len(data.files[0]["sha256"]) == 64
    with pytest.raises(ValueError, match=r"sums: someone/sums \(test\) has 2 rows, expected 3"):
        loaded(None, sums(data=DataFile(file="f.jsonl", rows=3)))


def test_without_data_one_line_says_which_file_belongs_where(tmp_path, monkeypatch, no_hub):
    with pytest.raises(ValueError) as nowhere:
        loaded(None, find_benchmark("gsm8k"))
    assert str(nowhere.value) == (
        "gsm8k: its data are missing: put gsm8k/test.jsonl (1,319 rows) below a data folder, and name that with "
        "--data-dir or R1_DATA; cannot load the data set x (split test): nobody answers"
    )
    monkeypatch.setenv("R1_DATA", str(tmp_path))
    for name in known():
        with pytest.raises(ValueError, match=f"{name}: its data are missing: put ") as caught:
            loaded(None, find_benchmark(name))
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_hub_costs_no_retries_without_a_network(monkeypatch):
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    for reachable in (True, False):
        monkeypatch.setattr(evals.data_files, "_reachable", lambda endpoint, answer=reachable: answer)
        with evals.data_files._no_retries_without_network():
            assert config.HF_HUB_OFFLINE is constants.HF_HUB_OFFLINE is (not reachable)
        assert config.HF_HUB_OFFLINE is constants.HF_HUB_OFFLINE is False


def test_whether_an_address_can_be_reached(monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert evals.data_files._reachable(f"http://127.0.0.1:{port}")
    assert not evals.data_files._reachable(f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert evals.data_files._reachable(f"http://127.0.0.1:{port}")


# --- verified


def test_a_checksum_that_differs_is_an_error_with_a_way_on(tmp_path):
    right = hashlib.sha256(lines(ROWS)).hexdigest()
    benchmark = sums(data=DataFile(file="sums/test.jsonl", sha256=f"{'0' * 64} {right}"), doc_to_target="answer")
    put(tmp_path)
    assert len(loaded(tmp_path, benchmark).problems) == 2
    changed = put(tmp_path, [*ROWS[:1], {"question": "2+2?", "answer": "5"}])
    found = hashlib.sha256(changed.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"sha256 of .* is {found}, expected {'0' * 64} or {right}; .*include: sums"):
        loaded(tmp_path, benchmark)


def test_a_checksum_may_be_of_what_is_compressed(tmp_path):
    plain = hashlib.sha256(lines(ROWS)).hexdigest()
    path = put(tmp_path, ROWS, "sums/test.jsonl.gz")
    data = loaded(tmp_path, sums(data=DataFile(file="sums/test.jsonl", sha256=plain)))
    assert data.files[0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() != plain
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"test\.jsonl\.gz cannot be read"):
        loaded(tmp_path, sums(data=DataFile(file="sums/test.jsonl", sha256=plain)))


def test_the_way_on_works(tmp_path, monkeypatch):
    put(tmp_path, [{"question": "How many?", "answer": "one\n#### 1"}], "gsm8k/test.jsonl")
    monkeypatch.setenv("R1_DATA", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"the sha256 of .* with `include: gsm8k` and its own sha256, and name that file"
    ):
        loaded(None, find_benchmark("gsm8k"))
    path = tmp_path / "mine.yaml"
    path.write_text("include: gsm8k\nsha256: ''\n")
    with pytest.raises(ValueError, match=r"has 1 rows, expected 1319; .*its own rows and problems"):
        loaded(None, find_benchmark(path))
    path.write_text("include: gsm8k\nsha256: ''\nrows: 1\n")
    with pytest.raises(ValueError, match=r"gives 1 problems, expected 1319; .*its own problems"):
        loaded(None, find_benchmark(path))
    path.write_text("include: gsm8k\nsha256: ''\nrows: 0\nproblems: 0\n")
    assert loaded(None, find_benchmark(path)).problems[0].answer == "1"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b"{", "t.jsonl:1: not JSON"),
        ("t.jsonl", b"", "sums: no problem is left"),
        ("t.json", b"{}", "must hold a list of objects"),
        ("t.json", b"[", "is not JSON"),
        ("t.csv", b"question,answer\n1\n", "a row has more or fewer fields than the header"),
        ("t.csv", b'question,answer\n"1', "is no readable CSV"),
        ("t.parquet", b"no", "not a readable parquet file"),
        ("t.txt", b"1", "the name of a data file ends in .jsonl, .jsonl.gz"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    put(tmp_path, content, name)
    with pytest.raises(ValueError, match=message) as caught:
        loaded(tmp_path, sums(data=DataFile(file=name)))
    assert "\n" not in str(caught.value)


# --- rows -> problems


def test_a_problem_of_a_row(tmp_path):
    put(tmp_path, [{**row, "level": n, "tags": ["x"]} for n, row in enumerate(ROWS)])
    benchmark = sums(group_by=("level",), instruction="Box it.", doc_id="sum {{level}}")
    problem = loaded(tmp_path, benchmark).problems[1]
    assert (problem.id, problem.prompt, problem.answer, problem.source) == ("sum 1", "2+2?\nBox it.", "4", "sums")
    assert problem.metadata == {**ROWS[1], "level": 1, "tags": ["x"], "doc_id": 1, "groups": {"level": "1"}}


def test_few_shot_prompts(tmp_path):
    put(tmp_path)
    benchmark = sums(
        base_text="Question: {{question}}\nAnswer:", instruction="Box it.", num_fewshot=1, description="Sums.\n\n",
        fewshot=({"question": "0+1?", "target": "one"}, {"question": "0+2?", "answer": "2"}),
    )  # fmt: skip
    first = "Sums.\n\nQuestion: 0+1?\nAnswer: one\n\n"
    assert loaded(tmp_path, benchmark, protocol=BASE).problems[0].prompt == f"{first}Question: 1+1?\nAnswer:"
    two = loaded(tmp_path, benchmark, protocol=protocol_of("few-shot", num_fewshot=2)).problems[0].prompt
    assert two == f"{first}Question: 0+2?\nAnswer: 2\n\nQuestion: 1+1?\nAnswer:"
    assert loaded(tmp_path, benchmark).problems[0].prompt == "Sums.\n\n1+1?\nBox it."
    none = loaded(tmp_path, benchmark, protocol=protocol_of("few-shot", num_fewshot=0)).problems[0].prompt
    assert none == "Sums.\n\nQuestion: 1+1?\nAnswer:"
    with pytest.raises(ValueError, match="sums: 3 few-shot examples are asked for and it has 2"):
        loaded(tmp_path, benchmark, protocol=protocol_of("few-shot", num_fewshot=3))


def test_a_limit_takes_the_first_and_checks_the_whole(tmp_path):
    put(tmp_path)
    assert [p.answer for p in loaded(tmp_path, sums(problems=2), limit=1).problems] == ["2"]
    assert len(loaded(tmp_path, limit=9).problems) == 2
    with pytest.raises(ValueError, match="expected 3"):
        loaded(tmp_path, sums(problems=3), limit=1)
    with pytest.raises(ValueError, match="limit must be >= 0"):
        loaded(tmp_path, limit=-1)


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_row_without_an_answer_is_named_or_dropped_on_purpose(tmp_path, caplog, answer):
    put(tmp_path, [ROWS[0], {"question": "3+3?", "answer": answer}])
    for template in ("answer", "{{answer}}", "{{answer | trim}}"):
        with pytest.raises(ValueError, match=r"sums, row 1: doc_to_target.*drop_unanswered: true") as caught:
            loaded(tmp_path, sums(doc_to_target=template))
        assert "\n" not in str(caught.value)
    data = loaded(tmp_path, sums(drop_unanswered=True))
    assert [p.id for p in data.problems] == ["sums/0"]
    assert [record.getMessage() for record in caplog.records] == [
        "sums: 1 of 2 rows have no answer and are left out (drop_unanswered)"
    ]


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (ROWS, {"doc_to_text": "{{quesion}}"}, r"sums, row 0: doc_to_text \({{quesion}}\): no column 'quesion'; the "
         r"columns are question, answer; did you mean 'question'\?"),
        (ROWS, {"doc_to_target": "answr"}, "no column 'answr'; the columns are .*; did you mean 'answer'"),
        (ROWS, {"doc_to_text": "{{question.nope.x}}"}, "doc_to_text .*has no attribute 'nope'"),
        (ROWS, {"doc_to_text": "{{question / 2}}"}, "doc_to_text .*TypeError"),
        (ROWS, {"doc_to_text": "{{question.__class__.__mro__}}"}, "doc_to_text .*unsafe"),
        (ROWS, {"doc_to_text": "{{ '' }}"}, "doc_to_text makes an empty question"),
        (ROWS, {"group_by": ("level",)}, "group_by: no column 'level'"),
        (ROWS, {"doc_id": "{{question[1]}}"}, r"the id '\+' occurs twice: name another doc_id"),
        ([{"question": None, "answer": "1"}], {"doc_to_text": "{{question | upper}}"},
         "row 0: doc_to_text: the column 'question' is null"),
        ([{"question": "1?", "answer": "\\frac{1"}], {}, "sums/0.*a gold answer that cannot be parsed"),
        (ROWS, {"doc_to_target": "{{answer | after('####')}}"}, "there is no '####' in the text"),
        (ROWS, {"doc_to_target": "{{answer | last_box}}"}, "there is no .*boxed"),
        (ROWS, {"process_docs": "json:loads"}, "row 0: process_docs json:loads failed: TypeError"),
        (ROWS, {"process_docs": "builtins:len"}, "row 0: builtins:len must return a row or None, got a int"),
        (ROWS, {"grader": "nowhere:f"}, "sums: grader: reward 'nowhere:f': no module 'nowhere'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_data_is_said_before_anything_is_drawn(tmp_path, rows, changes, message):
    from rewards import RewardConfig

    if "grader" in changes:
        changes = {"grader": RewardConfig(path=changes["grader"])}
    put(tmp_path, rows)
    with pytest.raises(ValueError, match=message) as caught:
        loaded(tmp_path, sums(**changes))
    assert "\n" not in str(caught.value)


def test_the_filters_of_the_templates(tmp_path):
    boxes = [r"so \boxed{1}. No: \boxed{\frac{1}{2}}", r"\boxed{3} and \boxed{5}", r"$\boxed 7$."]
    put(tmp_path, [{"question": str(n), "answer": text} for n, text in enumerate(boxes)])
    data = loaded(tmp_path, sums(doc_to_target="{{answer | last_box}}"))
    assert [p.answer for p in data.problems] == [r"\frac{1}{2}", "3, 5", "7"]
    put(tmp_path, [{"question": "?", "answer": "a #### 1 #### 2,000 "}])
    assert loaded(tmp_path, sums(doc_to_target="{{answer | after('####')}}")).problems[0].answer == "2,000"
    assert (
        loaded(tmp_path, sums(doc_to_target="{{answer | regex_replace('[^0-9]', '')}}")).problems[0].answer == "12000"
    )
