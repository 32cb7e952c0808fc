"""The arguments of ``r1 eval MODEL --benchmarks …`` and what is made of them."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evals.benchmark_data import BenchmarkData
    from evals.protocol import Protocol
    from pipelines.eval_samplers import Sampler
    from rollout.engine import EngineConfig

_MOST = 10_000  # completions per problem
_WHOLE = 32 << 30  # bytes of a folder that are read whole to tell its weights from others
_BLOCKS, _BLOCK = 4096, 1 << 16  # beyond that, of each file so many blocks of so many bytes, evenly spread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that matter with ``--benchmarks`` alone."""
    parser.add_argument("--benchmarks", metavar="A,B", help="benchmarks by name, or YAML files; without them the "
                        "held-out sets of a recipe are evaluated")  # fmt: skip
    group = parser.add_argument_group("with --benchmarks")
    group.description = "without --out everything is kept in runs/eval/MODEL-PROTOCOL"
    group.add_argument("--protocol", default="deepseek", help="deepseek (default), few-shot or greedy")
    group.add_argument("--samples", metavar="K", type=int, help="completions per problem; default: the benchmark's")
    group.add_argument("--temperature", metavar="T", type=float, help="0 is greedy")
    group.add_argument("--top-p", metavar="P", type=float, help="nucleus mass, (0, 1]")
    group.add_argument("--max-tokens", metavar="N", type=int, help="most tokens of one completion")
    group.add_argument("--template", help="chat, raw or r1-zero")
    group.add_argument("--num-fewshot", metavar="N", type=int, help="examples before each question")
    group.add_argument("--no-force-think", action="store_true", help="do not open the thinking for the model")
    group.add_argument("--checkpoint", metavar="WHICH", default="last", help="of a run: last, best (by its evaluations "
                       "during training), or a kept step's number")  # fmt: skip
    group.add_argument("--limit", metavar="N", type=int, default=0, help="only N problems of each benchmark")
    group.add_argument("--seed", type=int, default=0, help="of all sampling")
    group.add_argument("--data-dir", metavar="DIR", type=Path, help="where the data lie; else R1_DATA, else the hub")
    group.add_argument("--workers", metavar="N", type=int, help="engines; 0: one per core or GPU")
    group.add_argument("--tensor-parallel", metavar="N", type=int, help="GPUs per engine")
    group.add_argument("--dtype", default="auto", help="float32, bfloat16, or auto (float32 on a CPU)")
    group.add_argument("--no-attest", action="store_true", help="do not compare the engines with an own forward pass")
    group.add_argument("--processes", metavar="N", type=int, default=2, help="grading processes per benchmark")
    group.add_argument("--endpoint", metavar="URL", help="draw from an OpenAI-compatible endpoint instead of MODEL")
    group.add_argument("--model", dest="served", metavar="NAME", help="the model's name at the endpoint")
    group.add_argument("--concurrency", metavar="N", type=int, default=16, help="requests at a time to the endpoint")
    group.add_argument("--timeout", metavar="S", type=float, default=600.0, help="seconds of one request")
    group.add_argument("--retries", metavar="N", type=int, default=6, help="further attempts of one request")
    group.add_argument("--requests-per-minute", metavar="N", type=int, default=0, help="0: no limit")
    group.add_argument("--api-key-env", metavar="VAR", default="OPENAI_API_KEY", help="variable that holds the key")


def refuse_leftovers(options: argparse.Namespace) -> None:
    """Without ``--benchmarks`` these options mean nothing, and none of them is passed over.

    Raises:
        ValueError: names the first that was given.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    for dest, value in vars(parser.parse_args([])).items():
        if dest != "benchmarks" and getattr(options, dest) != value:
            name = "model" if dest == "served" else dest.replace("_", "-")
            raise ValueError(f"--{name} is for benchmarks: add --benchmarks A,B, or leave it out")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluates, and prints the table of figures.

    Raises:
        ValueError: something asked for cannot be; finished samples are kept.
    """
    from evals.benchmark import find_benchmark
    from evals.benchmark_data import load_benchmark
    from evals.protocol import protocol_of
    from pipelines.eval_run import EvalPlan, evaluate_benchmarks
    from pipelines.eval_view import open_eval_view
    from pipelines.files import append_line

    names = [name.strip() for name in options.benchmarks.split(",") if name.strip()]
    if not names:
        raise ValueError("--benchmarks names none")
    if options.out is not None and not str(options.out).strip(". "):
        raise ValueError("--out must name a folder of its own")
    if options.samples is not None and not 1 <= options.samples <= _MOST:
        raise ValueError(f"--samples must be >= 1 and <= {_MOST:,}, got {options.samples:,}")
    for name, least in (("limit", 0), ("seed", 0), ("processes", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be >= {least}, got {getattr(options, name)}")
    protocol = protocol_of(
        options.protocol, samples=options.samples, temperature=options.temperature, top_p=options.top_p,
        max_tokens=options.max_tokens, template=options.template, num_fewshot=options.num_fewshot,
        force_think=False if options.no_force_think else None,
    )  # fmt: skip
    found = [find_benchmark(name) for name in names]
    twice = next((one.name for index, one in enumerate(found) if one.name in [o.name for o in found[:index]]), None)
    if twice is not None:
        raise ValueError(f"--benchmarks names {twice} twice")
    if options.endpoint is None and options.model is None:
        raise ValueError("name a model (a Hugging Face folder or id, a run folder), or --endpoint URL --model NAME")
    model, identity = _model_of(options)
    data = [
        load_benchmark(one, protocol=protocol, data_dir=options.data_dir, limit=options.limit, seed=options.seed)
        for one in found
    ]
    out = options.out or Path("runs/eval") / f"{_folder_name(model)}-{options.protocol}"
    out = out.expanduser().absolute()
    plan = EvalPlan(
        model=model, identity=identity, benchmarks=data, protocol=protocol, seed=options.seed, out=out,
        samples={one.name: protocol.samples_for(one) for one in found}, limit=options.limit,
        processes=options.processes, search=(os.getcwd(), *_folders_of(names)),
        own={one.name: str(Path(name).expanduser().absolute()) for one, name in zip(found, names, strict=True)
             if one.folder},
    )  # fmt: skip
    events = out / "events.jsonl"
    sampler = _sampler(options, model, protocol, partial(_note, append_line, events))
    summary = evaluate_benchmarks(plan, sampler, open_eval_view())
    _print(summary, data, out)
    return {**summary, "results": {name: _brief(row) for name, row in summary["results"].items()}, "out": str(out)}


def _note(append: Any, path: Path, event: Mapping[str, Any]) -> None:
    append(path, json.dumps(event, default=str))


def _model_of(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The model as results name it, and what tells its weights from others."""
    if options.endpoint is not None:
        engine = [name for name in ("workers", "tensor_parallel") if getattr(options, name) is not None]
        engine += ["no_attest"] if options.no_attest else []
        engine += ["dtype"] if options.dtype != "auto" else []
        if options.overrides or engine:
            given = options.overrides[0] if options.overrides else "--" + engine[0].replace("_", "-")
            raise ValueError(f"{given} is for engines; an endpoint has its own")
        if not options.served:
            raise ValueError("--endpoint needs --model NAME: which of its models answers")
        return options.served, {"endpoint": options.endpoint, "model": options.served}
    from pipelines.run_models import model_folder

    path = Path(options.model).expanduser()
    folder = model_folder(path, options.checkpoint) if path.exists() else _downloaded(options.model)
    name = str(folder.absolute() if path.exists() else options.model)
    numerics = {"dtype": _dtype(options.dtype), "max_model_len": _engine(options).max_model_len}
    return name, {"model": name, "weights": fingerprint(folder), **numerics}


def _downloaded(name: str) -> Path:
    """The folder of a model of the hub, downloaded when it is not there yet.

    Raises:
        ValueError: there is no such folder and no such model, or no way to the hub.
    """
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"there is no model folder {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name!r} is no folder here, and as a model of the hub it cannot be loaded: {reason}"
        ) from None


def fingerprint(folder: Path) -> str:
    """Hash over config, tokenizer and weights of a folder; beyond 32 GiB of sizes and blocks that are evenly spread."""
    digest = hashlib.blake2b(digest_size=16)
    kinds = (".json", ".safetensors", ".bin", ".model", ".jinja")
    files = [p for p in sorted(folder.iterdir()) if (p.suffix in kinds or p.name == "merges.txt") and p.is_file()]
    whole = sum(path.stat().st_size for path in files) <= _WHOLE
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        last = max(0, size - _BLOCK)
        spread = {round(last * block / (_BLOCKS - 1)) for block in range(_BLOCKS)}
        starts = range(0, size, _BLOCK) if whole else sorted(spread)
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _sampler(options: argparse.Namespace, model: str, protocol: Protocol, note: Any) -> Sampler:
    from pipelines.eval_samplers import EndpointSampler, EngineSampler

    if options.endpoint is not None:
        from rollout.endpoint_protocol import EndpointConfig

        config = EndpointConfig(
            url=options.endpoint, model=options.served, concurrency=options.concurrency, timeout_s=options.timeout,
            retries=options.retries, requests_per_minute=options.requests_per_minute, api_key_env=options.api_key_env,
        )  # fmt: skip
        return EndpointSampler(config, protocol)
    from pipelines.run_models import model_folder

    path = Path(options.model).expanduser()
    folder = model_folder(path, options.checkpoint) if path.exists() else _downloaded(options.model)
    return EngineSampler(
        folder, protocol, _engine(options), dtype=_dtype(options.dtype), seed=options.seed, note=note,
        attest=not options.no_attest,
        keep_context=any(given.startswith("engine.max_model_len=") for given in options.overrides),
    )  # fmt: skip


def _engine(options: argparse.Namespace) -> EngineConfig:
    """The engines as ``engine.key=value`` and the shorter options say."""
    from pipelines.recipe_source import apply_override, parse_override, parse_recipe
    from pipelines.schema import Builder
    from rollout.engine import EngineConfig

    given = list(options.overrides)
    if options.workers is not None:
        given.append(f"engine.workers={options.workers}")
    if options.tensor_parallel is not None:
        given.append(f"engine.tensor_parallel={options.tensor_parallel}")
    root = parse_recipe("engine: {}\n", "command line")
    for override in given:
        if not override.startswith("engine."):
            raise ValueError(f"with --benchmarks only engine.key=value can be given, got {override!r}")
        apply_override(root, *parse_override(override))
    return Builder().build(EngineConfig, root.value["engine"], "engine")


def _dtype(asked: str) -> str:
    if asked not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--dtype must be auto, float32 or bfloat16, got {asked!r}")
    if asked != "auto":
        return asked
    return "bfloat16" if any(Path("/dev").glob("nvidia[0-9]*")) else "float32"


def _folders_of(names: Sequence[str]) -> list[str]:
    """Folders of benchmarks that are named by a file: graders of the user's lie beside them."""
    return [str(Path(name).expanduser().absolute().parent) for name in names if Path(name).suffix]


def _folder_name(model: str) -> str:
    path = Path(model)
    name = path.parent.parent.name if path.name == "model" and path.parent.parent.name else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name or "model")


def _brief(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "by_problem"}


def _print(summary: Mapping[str, Any], data: Sequence[BenchmarkData], out: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pipelines.console import printable
    from pipelines.eval_options import percent

    table = Table(
        title=f"{summary['protocol']['name']}, % with 95 % interval over problems", title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for header in ("benchmark", "n x k", "", "", "cut", "no answer", "tokens"):
        first = header == "benchmark"
        table.add_column(header, justify="left" if first else "right", overflow="fold", no_wrap=not first)
    for one in data:
        row = summary["results"][one.benchmark.name]
        figures = [("pass@1", row["pass_at_1"], row["ci95"])]
        if highest := row["pass_at"].get(str(row["k"])):
            figures.append((f"pass@{row['k']}", highest["value"], highest["ci95"]))
        if row.get("maj"):
            figures.append((f"maj@{row['k']}", row["maj"]["value"], row["maj"]["ci95"]))
        shares = row["shares"]
        beside = [f"{shares['truncated']:.0%}", f"{shares['unanswered']:.0%}", f"{row['tokens']['mean']:.0f}"]
        for number, (name, value, ci95) in enumerate(figures):
            head = [Text(one.benchmark.name), f"{row['n']} x {row['k']}"] if number == 0 else ["", ""]
            table.add_row(*head, name, percent(value, ci95).removesuffix(" %"), *(beside if number == 0 else [""] * 3))
    console = Console()
    console.print(table)
    for one in data:
        row = summary["results"][one.benchmark.name]
        if row["shares"]["error"]:
            told = next(iter(row["errors"].items()), ("", ""))
            failed = f"{one.benchmark.name}: the grader failed on {row['shares']['error']:.0%} of the samples"
            console.print(printable(f"{failed}; they are in no figure. The first: {told[0]}: {told[1]}"), markup=False)
    console.print(f"model: {summary['model']}", markup=False)
    console.print(f"everything is in {out} (report.html to look at)", markup=False)
