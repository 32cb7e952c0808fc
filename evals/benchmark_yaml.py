"""A benchmark's YAML -> Benchmark.

The keys are lm-evaluation-harness's where that tool has one, and a few of our own. Of its other keys, those that change
what is measured are refused, and those that do not are named in one warning: none is ignored silently.
docs/evals/benchmarks.md lists them side by side.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from evals.benchmark import CATALOG, Benchmark, DataFile
from evals.hooks import HARNESS, find_function, one_line
from evals.nearest import nearest
from evals.templates import check_template, is_template
from rewards.base import RewardConfig

_log = logging.getLogger(__name__)

_HARNESS_TEXTS = (
    "task", "dataset_path", "dataset_name", "test_split", "validation_split", "process_docs", "custom_dataset",
    "doc_to_text", "doc_to_target", "description", "target_delimiter", "fewshot_delimiter", "output_type",
)  # fmt: skip
_OWN_TEXTS = ("about", "origin", "doc_id", "instruction", "base_text", "base_answer", "answer_prefix")
_NUMBERS = ("num_fewshot", "repeats", "rows", "problems")
_MAPPINGS = ("dataset_kwargs", "fewshot_config", "generation_kwargs", "metadata")
_TEMPLATES = ("doc_to_text", "doc_to_target", "doc_id", "description", "base_text", "base_answer")
_FUNCTIONS = ("process_docs", "custom_dataset")
_KEYS = (
    *_HARNESS_TEXTS, *_OWN_TEXTS, *_NUMBERS, *_MAPPINGS, "include", "data_file", "sha256", "grader", "group_by",
    "drop_unanswered",
)  # fmt: skip

TOLD = {
    "task_alias": "results go by task", "tag": "there are no groups of tasks", "group": "there are no groups of tasks",
    "training_split": "nothing is trained", "fewshot_split": "examples come from fewshot_config.samples",
    "should_decontaminate": "overlaps are looked for by a command of their own",
    "doc_to_decontamination_query": "overlaps are looked for by a command of their own",
    "unsafe_code": "programs run in the sandbox",
}  # fmt: skip
"""lm-evaluation-harness's keys that do nothing here, and why."""

JUDGING = ("metric_list", "filter_list")
"""Its keys that say how an answer is judged: left unread where ``grader`` says it, refused otherwise."""

REFUSED = {
    "doc_to_choice": "choices are compared there by log-likelihood; write the options into doc_to_text, the letter "
    "into doc_to_target, and grader: choice",
    "process_results": "write a grader, module:function",
    "gen_prefix": "write the text into base_text",
    "use_prompt": "write the prompt into doc_to_text",
    "doc_to_image": "problems are texts here",
    "doc_to_audio": "problems are texts here",
}
"""Its keys that change what is measured and that there is no equal of, and what to write."""


def load_yaml(path: Path) -> Benchmark:
    """Reads a benchmark's file, and what it includes.

    Raises:
        ValueError: it cannot be read, is no YAML, or its keys make no benchmark.
    """
    return from_keys(_read(path, ()), path)


def from_keys(keys: Mapping[str, Any], path: Path) -> Benchmark:
    """A benchmark from YAML's keys.

    Args:
        keys: as they stand in the file.
        path: of the file: names it in messages, says where functions and data are looked for, and gives the benchmark
            its name where ``task`` does not.

    Raises:
        ValueError: an unknown or refused key, a value of a wrong kind, or a function or template that cannot be used.
    """
    try:
        _check_names(keys)
        _check_kinds(keys)
        benchmark = Benchmark(**_fields(keys, path))
        for name in _TEMPLATES:
            if is_template(getattr(benchmark, name)):
                check_template(getattr(benchmark, name), name)
        for name in _FUNCTIONS:
            if getattr(benchmark, name):
                find_function(getattr(benchmark, name), benchmark.folder)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _tell_unread(keys, path)
    return benchmark


def _check_names(keys: Mapping[str, Any]) -> None:
    for key in keys:
        if key in REFUSED:
            raise ValueError(f"{key} of lm-evaluation-harness is not taken: {REFUSED[key]}")
        if key in JUDGING and "grader" not in keys:
            raise ValueError(
                f"{key} of lm-evaluation-harness is not used to judge: write grader: accuracy (or choice, code_tests, "
                "module:function), and it is left unread"
            )
        if key not in (*_KEYS, *TOLD, *JUDGING):
            raise ValueError(f"unknown key {key!r}{nearest(str(key), [*_KEYS, *TOLD])}")


def _check_kinds(keys: Mapping[str, Any]) -> None:
    kinds: dict[str, tuple[Any, str]] = {name: (str, "a text") for name in (*_HARNESS_TEXTS, *_OWN_TEXTS)}
    kinds |= {name: (int, "a whole number") for name in _NUMBERS}
    kinds |= {name: (Mapping, "a mapping") for name in _MAPPINGS}
    kinds |= {"grader": ((str, Mapping), "a name or a mapping"), "drop_unanswered": (bool, "true or false")}
    kinds |= {name: ((str, list), "a text or a list of texts") for name in ("data_file", "sha256", "group_by")}
    for key, value in keys.items():
        kind, meaning = kinds.get(key, (object, ""))
        wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
        wrong = wrong or (isinstance(value, list) and key in kinds and not all(isinstance(v, str) for v in value))
        if wrong and not (value is None and kind is not bool):  # lm-evaluation-harness writes null for "none"
            raise ValueError(f"{key} must be {meaning}, got {_shown(value)}")
    if keys.get("output_type") not in (None, "generate_until"):
        raise ValueError(
            f"output_type {keys['output_type']} of lm-evaluation-harness is not taken: answers are generated here "
            "(generate_until)"
        )


def _fields(keys: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The arguments of Benchmark."""
    given = {key: value for key, value in keys.items() if value is not None}
    names = {field.name for field in fields(Benchmark)}
    found: dict[str, Any] = {key: value for key, value in given.items() if key in names}
    folder = "" if path.parent == CATALOG else str(path.parent.resolve())
    generation = given.get("generation_kwargs", {})
    found |= {
        "name": given.get("task", path.stem),
        "version": str(given.get("metadata", {}).get("version", "0")),
        "doc_to_text": given.get("doc_to_text", ""),
        "test_split": given.get("test_split") or given.get("validation_split") or "test",  # as there
        "data": _data_file(given),
        "group_by": _texts(given.get("group_by", ())),
        "grader": _grader(given.get("grader", "accuracy")),
        "fewshot": _examples(given.get("fewshot_config", {}), folder),
        "folder": folder,
    }
    until = generation.get("until", given.get("fewshot_delimiter", "\n\n"))
    if not isinstance(until, str) and not (isinstance(until, list) and all(isinstance(each, str) for each in until)):
        raise ValueError(f"generation_kwargs.until must be a text or a list of texts, got {_shown(until)}")
    found["until"] = tuple(each for each in _texts(until) if each)
    return found


def _data_file(given: Mapping[str, Any]) -> DataFile | None:
    files = _texts(given.get("data_file", ()))
    if not files:
        if "sha256" in given or "rows" in given:
            raise ValueError("rows and sha256 are of a local file: write data_file, or use problems")
        return None
    return DataFile(
        file=files[0], also=files[1:], rows=given.get("rows", 0), sha256=" ".join(_texts(given.get("sha256", ())))
    )


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _grader(value: str | Mapping[str, Any]) -> RewardConfig:
    given: dict[str, Any] = {"path": value} if isinstance(value, str) else dict(value)
    names = [field.name for field in fields(RewardConfig)]
    for key in given:
        if key not in names:
            raise ValueError(f"grader has no {key!r}{nearest(str(key), names)}")
    if "path" not in given:
        raise ValueError("grader needs path: accuracy, choice, code_tests, reasoning_gym or module:function")
    try:
        return RewardConfig(**given)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"grader: {one_line(error)}") from None


def _examples(config: Mapping[str, Any], folder: str) -> tuple[Mapping[str, Any], ...]:
    for key in config:
        if key not in ("samples", "sampler"):
            raise ValueError(
                f"fewshot_config.{key} is not taken{nearest(str(key), ('samples', 'sampler'))}; write the examples "
                "themselves under fewshot_config.samples"
            )
    samples = config.get("samples") or ()
    if isinstance(samples, str):
        function = find_function(samples, folder)
        try:
            samples = function()
        except Exception as error:  # a user's code
            raise ValueError(f"fewshot_config.samples: {samples} failed: {one_line(error)}") from error
    if not isinstance(samples, list | tuple) or not all(isinstance(each, Mapping) for each in samples):
        raise ValueError("fewshot_config.samples must be a list of mappings, each with question and target")
    return tuple(dict(each) for each in samples)


def tell(line: str) -> None:
    """One line to the user, on standard error where nobody set up logging."""
    _log.warning("%s", line)


def _tell_unread(keys: Mapping[str, Any], path: Path) -> None:
    """One line on what was there and was not read."""
    notes = [f"{key} ({TOLD[key]})" for key in keys if key in TOLD]
    notes += [f"{key} (the grader judges)" for key in keys if key in JUDGING]
    notes += [
        f"generation_kwargs.{key} (the protocol says it)"
        for key in keys.get("generation_kwargs") or ()
        if key != "until"
    ]
    sampler = (keys.get("fewshot_config") or {}).get("sampler", "first_n")
    if sampler != "first_n":
        notes.append("fewshot_config.sampler (the first examples are taken)")
    if keys.get("test_split") and keys.get("validation_split"):
        notes.append("validation_split (there is a test_split)")
    if notes:
        tell(f"{path}: not read here: {', '.join(notes)}")


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a file over those that it includes. Their ``task`` is theirs alone: two benchmarks share no name."""
    path = path.resolve()
    if path in chain:
        raise ValueError(f"{path}: a file includes itself")
    keys = _parsed(path)
    bases: dict[str, Any] = {}
    for name in _texts(keys.pop("include", None) or ()):
        bases |= _read(_included(name, path), (*chain, path))
    bases.pop("task", None)
    keys = bases | keys
    for key in _FUNCTIONS:
        if isinstance(keys.get(key), str):
            keys[key] = _located(keys[key], path.parent)
    grader = keys.get("grader")
    if isinstance(grader, str):
        keys["grader"] = _located(grader, path.parent)
    elif isinstance(grader, dict) and isinstance(grader.get("path"), str):
        keys["grader"] = grader | {"path": _located(grader["path"], path.parent)}
    return keys


def _included(name: str, path: Path) -> Path:
    """The file of an ``include``: beside the file that includes it, or a shipped benchmark by its name."""
    for candidate in (path.parent / Path(name).expanduser(), CATALOG / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = [each.stem for each in CATALOG.glob("[!_]*.yaml")]
    raise ValueError(
        f"{path}: include: there is no {name} beside it, nor a benchmark of that name{nearest(name, shipped)}"
    )


def _located(path: str, folder: Path) -> str:
    """``file.py:function``, and ``module:function`` of a module beside the YAML, with the folder before it."""
    module, colon, name = path.rpartition(":")
    if not colon or path.startswith(HARNESS):
        return path
    for candidate in (folder / module, folder / f"{module}.py"):
        if candidate.suffix == ".py" and candidate.is_file():
            return f"{candidate}:{name}"
    return path


def _parsed(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
    loader = _Loader(text)
    loader.folder = path.parent
    try:
        keys = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ValueError(f"{place}: this is not valid YAML: {one_line(Exception(error.problem or error))}") from None
    except (yaml.YAMLError, ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: this is not valid YAML: {one_line(error)}") from None
    finally:
        loader.dispose()
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"{path}: a benchmark is a mapping of keys to values, e.g. doc_to_text: '{{{{question}}}}'")
    return keys


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key twice, and reads ``!function file.name`` as lm-evaluation-harness does."""

    folder = Path()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is written twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def function(self, node: yaml.Node) -> str:
        module, _, name = str(node.value).strip().rpartition(".")
        return f"{HARNESS}{self.folder / module.replace('.', '/')}.py:{name}"


_Loader.add_constructor("!function", _Loader.function)


def _shown(value: Any) -> str:
    """A wrong value in an error message; of what could be large, only its kind."""
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
