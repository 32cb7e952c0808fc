"""What a benchmark is, and how one is found by its name or its file.

Every benchmark that is shipped is one small file in ``evals/catalog``; ``reasoning_gym:NAME`` is made in code. A user's
own is a YAML file, or a Python file where YAML is not enough (docs/evals/benchmarks.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.hooks import load_file
from evals.nearest import nearest
from rewards.base import RewardConfig

CATALOG = Path(__file__).parent / "catalog"
GYM = "reasoning_gym:"
_GYM_VERSION = "1"
GYM_PROBLEMS = 100


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A local file of a benchmark.

    Attributes:
        file: its path below the data folder, e.g. ``gsm8k/test.jsonl``; the same with or without ``.gz`` is taken too.
        rows: how many it has; 0 does not check.
        sha256: of the file as it lies, or of what a ``.gz`` holds; several accepted ones are parted by blanks; empty
            does not check.
        also: other names that are accepted.
    """

    file: str
    rows: int = 0
    sha256: str = ""
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.file.strip():
            raise ValueError("data_file is empty")
        if self.rows < 0:
            raise ValueError(f"rows must be >= 0 (0 does not check), got {self.rows}")
        for digest in self.sha256.split():
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise ValueError(f"sha256 must be 64 hex digits in lower case, got {digest[:80]!r}")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A set of problems, how they are asked, and how answers are judged.

    Attributes:
        name: how results are named.
        version: of prompt, data and grading; figures of different versions are not comparable.
        about: one sentence.
        data: the local file; None where there is none.
        dataset_path, dataset_name, test_split: the data set on the hub; without a path there is none.
        dataset_kwargs: further arguments of ``datasets.load_dataset``, or of a reasoning-gym generator.
        custom_dataset: a function that makes the rows: it returns them by split.
        origin: where the file comes from, for those who lack it.
        problems: how many there are once rows were processed and dropped; 0 does not check.
        doc_to_text: template of the question (evals.templates).
        doc_to_target: template of the gold answer; empty where the grader needs none.
        doc_id: template of the problem's id; empty numbers the rows.
        process_docs: ``module:function`` or ``file.py:function``, row -> row, or None to leave it out.
        drop_unanswered: rows without a gold answer are left out; otherwise they are an error.
        grader: what judges an answer: a score >= 1 is right.
        instruction: what is asked of a chat model after the question; empty for nothing.
        description: template of what stands before everything.
        base_text: template of the question for a base model, over ``question`` and the columns; empty: the question.
        base_answer: template of the program that a base model's completion makes, over ``completion`` and the columns.
        target_delimiter, fewshot_delimiter: between question and target of an example, and after each example.
        repeats: completions per problem (k) where the protocol does not say.
        num_fewshot, fewshot: how many of the examples a base model sees, and the examples: ``question`` and ``target``,
            or the columns that the templates read.
        until: stop strings for a base model.
        answer_prefix: regular expression of what stands before the answer in a base model's text.
        group_by: columns by which results are broken down.
        folder: where the YAML lies; empty for what is shipped.
    """

    name: str
    version: str
    about: str = ""
    data: DataFile | None = None
    dataset_path: str = ""
    dataset_name: str = ""
    test_split: str = "test"
    dataset_kwargs: Mapping[str, Any] = field(default_factory=dict)
    custom_dataset: str = ""
    origin: str = ""
    problems: int = 0
    doc_to_text: str
    doc_to_target: str = ""
    doc_id: str = ""
    process_docs: str = ""
    drop_unanswered: bool = False
    grader: RewardConfig = field(default_factory=lambda: RewardConfig(path="accuracy"))
    instruction: str = ""
    description: str = ""
    base_text: str = ""
    base_answer: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    repeats: int = 1
    num_fewshot: int = 0
    fewshot: tuple[Mapping[str, Any], ...] = ()
    until: tuple[str, ...] = ("\n\n",)
    answer_prefix: str = ""
    group_by: tuple[str, ...] = ()
    folder: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.+:-]+", self.name) or self.name.startswith("."):
            raise ValueError(f"the name of a benchmark is made of letters, digits and . + : - _, got {self.name!r}")
        if self.name in ("eval.json", "summary.json", "events.jsonl", "report.md", "report.html"):
            raise ValueError(f"a benchmark cannot be called {self.name}: that is a file of the results")
        if len(str(self.version)) > 100:
            raise ValueError("metadata.version is a short text or a number")
        if not self.version:
            raise ValueError("a benchmark needs a version (metadata.version)")
        if not self.doc_to_text.strip():
            raise ValueError("doc_to_text is empty: it is the question, e.g. {{question}}")
        for name, least in (("repeats", 1), ("num_fewshot", 0), ("problems", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.grader.path in ("accuracy", "choice") and not self.doc_to_target:
            raise ValueError(f"the grader {self.grader.path} compares with a gold answer: write doc_to_target")
        if self.data is None and not self.dataset_path and not self.custom_dataset:
            raise ValueError("there are no data: write data_file, dataset_path or custom_dataset")
        if not all(self.until):
            raise ValueError("a stop string of generation_kwargs.until is empty")
        try:
            re.compile(self.answer_prefix)
        except re.error as error:
            raise ValueError(f"answer_prefix is no regular expression: {error}") from None


def known() -> list[str]:
    """Names of the benchmarks that are shipped, sorted; ``reasoning_gym:NAME`` comes on top of these."""
    return sorted(path.stem for path in CATALOG.glob("[!_]*.yaml"))


def find_benchmark(name_or_path: str | Path) -> Benchmark:
    """A benchmark by its name, or from a user's file.

    Args:
        name_or_path: one of :func:`known`, ``reasoning_gym:NAME``, a path that ends in ``.yaml`` or ``.yml``, or one
            that ends in ``.py``, with ``:NAME`` behind it where it is not called ``BENCHMARK``. What stands there is a
            Benchmark, a dict of YAML's keys, or a function that returns either.

    Raises:
        ValueError: nothing has that name (the nearest is named), or the file is not there or cannot be used.
    """
    text = str(name_or_path)
    if text.startswith(GYM):
        return _of_reasoning_gym(text.removeprefix(GYM))
    if text.endswith((".yaml", ".yml")):
        from evals.benchmark_yaml import load_yaml

        return load_yaml(_existing(text))
    file, _, attribute = text.partition(".py:") if ".py:" in text else (text.removesuffix(".py"), "", "")
    if text.endswith(".py") or attribute:
        return _of_python(f"{file}.py", attribute or "BENCHMARK")
    if text in known():
        from evals.benchmark_yaml import load_yaml

        return load_yaml(CATALOG / f"{text}.yaml")
    hint = nearest(text, [*known(), f"{GYM}NAME"])
    raise ValueError(f"there is no benchmark {text!r}{hint}; a file of your own ends in .yaml or .py")


def _existing(text: str) -> Path:
    path = Path(text).expanduser()
    if path.is_file():
        return path
    hint = f"; the shipped one is called {path.stem}" if path.stem in known() else ""
    raise ValueError(f"there is no benchmark file {text} (seen from {Path.cwd()}){hint}")


def _of_python(text: str, attribute: str) -> Benchmark:
    from evals.benchmark_yaml import from_keys

    path = _existing(text)
    module = load_file(str(path.resolve()))
    found = getattr(module, attribute, None)
    if found is None:
        names = [name for name in vars(module) if not name.startswith("_")]
        raise ValueError(f"{path} has no {attribute}{nearest(attribute, names)}; name another with {path}:NAME")
    if callable(found):
        try:
            found = found()
        except Exception as error:  # a user's code
            raise ValueError(f"{path}:{attribute}() failed: {type(error).__name__}: {error}") from error
    if isinstance(found, Benchmark):
        return found
    if isinstance(found, Mapping):
        return from_keys(dict(found), path)
    raise ValueError(f"{path}:{attribute} must be a Benchmark or a dict of its keys, got a {type(found).__name__}")


def _of_reasoning_gym(name: str) -> Benchmark:
    if name not in (registered := _gym_names(name)):
        raise ValueError(f"reasoning_gym has no data set {name!r}{nearest(name, registered)}")
    return Benchmark(
        name=f"{GYM}{name}",
        version=_GYM_VERSION,
        about=f"{GYM_PROBLEMS} problems of reasoning-gym's generator {name}, judged by its own scorer.",
        dataset_path="reasoning_gym",
        dataset_name=name,
        problems=GYM_PROBLEMS,
        doc_to_text="question",
        grader=RewardConfig(path="reasoning_gym", params={"strict": True}, timeout_s=30.0),
        instruction="Please reason step by step, and put your final answer within <answer> and </answer>.",
        base_text="Question: {{question}}\nAnswer:",
        until=("\nQuestion:",),
        answer_prefix=r"the (?:final )?answer is:?",
        repeats=4,
    )


def _gym_names(name: str) -> list[str]:
    """Names of reasoning-gym's data sets, or only this one where a module is called like it: that costs no import."""
    import importlib
    import importlib.util

    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("reasoning_gym is not installed: it is part of the requirements, run the set-up again")
    root = Path(spec.submodule_search_locations[0])
    if name.isidentifier() and len(list(root.glob(f"*/{name}.py"))) == 1:
        return [name]
    importlib.import_module("reasoning_gym")
    return sorted(importlib.import_module("reasoning_gym.factory").DATASETS)
