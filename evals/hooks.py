"""Python functions that a benchmark's YAML names, for what YAML is not enough for.

They are written ``module:function`` or ``file.py:function``, a file being looked for beside the YAML. lm-evaluation-
harness's ``!function file.function`` means the same file; what it names is called as that tool would call it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HARNESS = "!function "
"""How the path of a function begins that is called by lm-evaluation-harness's conventions."""


def find_function(path: str, folder: str = "") -> Callable[..., Any]:
    """The function behind ``module:function`` or ``file.py:function``.

    Args:
        path: with or without the mark of a harness function.
        folder: where files are looked for, before the working directory.

    Raises:
        ValueError: no such file, module or function, it is not callable, or its module cannot be imported.
    """
    module_name, colon, name = path.removeprefix(HARNESS).strip().rpartition(":")
    if not colon or not module_name or not name:
        raise ValueError(f"a function is written module:function or file.py:function, got {path!r}")
    module = load_file(module_name, folder) if module_name.endswith(".py") else _load_module(module_name)
    found = getattr(module, name, None)
    if found is None:
        raise ValueError(f"{module_name} has no {name!r}")
    if not callable(found):
        raise ValueError(f"{module_name}:{name} is a {type(found).__name__}, not a function")
    return found


def load_file(name: str, folder: str = "") -> Any:
    """The module of a Python file; one file is one module, however often it is named.

    Raises:
        ValueError: no such file, or it fails while it is imported.
    """
    tried = [Path(folder) / Path(name).expanduser(), Path(name).expanduser()]
    file = next((path.resolve() for path in tried if path.is_file()), None)
    if file is None:
        where = f"beside the YAML in {folder} and in {Path.cwd()}" if folder else f"seen from {Path.cwd()}"
        raise ValueError(f"the file {name} is not there ({where})")
    module_name = f"_benchmark_file_{hashlib.blake2b(str(file).encode(), digest_size=8).hexdigest()}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look modules up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's code
        del sys.modules[module_name]
        raise ValueError(f"{file} cannot be imported: {type(error).__name__}: {one_line(error)}") from error
    return module


def _load_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a user's code
        raise ValueError(f"the module {name} cannot be imported: {type(error).__name__}: {one_line(error)}") from error


def one_line(error: BaseException, longest: int = 300) -> str:
    """The message of an exception on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
