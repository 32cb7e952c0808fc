"""Answers/s of the verifier pool, one worker process, against math-verify in one process; what bombs leave of it.

Real answers where a folder ``cases`` lies beside the one that R1_DATA names, made-up ones elsewhere; the notes say.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from benchmarks.math_verify_peer import serve
from benchmarks.measure import Comparison, Series, take_turns
from benchmarks.options import Options
from benchmarks.peer import Peer
from rewards.base import RewardConfig
from rewards.grading_cases import read_cases
from rewards.rubric import Rubric, RubricConfig
from rollout.types import Completion, FinishReason, Problem, Rollout, RolloutGroup

Pair = tuple[str, str]
_BOMBS = ("(a+b+c+d+e)^{60}-(a+b+c+d)^{60}", "9^{9^{9^{9}}}", "((100!)!)!", "\\sum_{k=1}^{10^{9}} k^{k}")
_BOMB_SHARE = 0.05
_LIMIT_S = 0.5


def run(options: Options) -> list[Comparison]:
    """See the module."""
    count = options.pick(1_500, 200)
    with Peer("math-verify", serve) as peer:
        found = [
            _against_math_verify(peer, key, title, pairs[:count], source, options)
            for key, title, (pairs, source) in (
                (
                    "grading-gsm8k",
                    "Verifier pool against math-verify, answers of grade-school problems",
                    gsm8k(options),
                ),
                (
                    "grading-math",
                    "Verifier pool against math-verify, answers of competition problems",
                    competition(options),
                ),
            )
        ]
    return [*found, _with_bombs(gsm8k(options)[0][:count], options)]


def gsm8k(options: Options) -> tuple[list[Pair], str]:
    """Gold and completion; whole numbers."""
    if real := _real("real_gsm8k_openai.jsonl.gz"):
        return real
    draw = random.Random(options.seed)
    numbers = [draw.randint(1, 5_000) for _ in range(1_500)]
    return [(str(n), f"\\boxed{{{n if draw.random() < 0.5 else n + 1}}}") for n in numbers], "made up: whole numbers"


def competition(options: Options) -> tuple[list[Pair], str]:
    """Gold and completion; numbers, fractions, roots, intervals, expressions."""
    if real := _real("real_math500_answers.jsonl"):
        return real
    draw = random.Random(options.seed)
    forms = ("{a}", "\\frac{{{a}}}{{{b}}}", "{a}\\sqrt{{{b}}}", "({a},{b})", "x^2+{a}x-{b}", "[{a},\\infty)", "{a}\\pi")
    pairs = []
    for _ in range(1_500):
        text = draw.choice(forms).format(a=draw.randint(2, 99), b=draw.randint(2, 99))
        pairs.append((text, f"\\boxed{{{text if draw.random() < 0.8 else text + '+1'}}}"))
    return pairs, "made up: seven forms"


def _real(name: str) -> tuple[list[Pair], str] | None:
    if "R1_DATA" not in os.environ:
        return None
    path = Path(os.environ["R1_DATA"]).resolve().parent / "cases" / "math_answers" / name
    if not path.is_file():
        return None
    rows = list(read_cases(path))
    bare = [str(r["prediction"]) if r.get("kind") == "completion" else f"\\boxed{{{r['prediction']}}}" for r in rows]
    return [(str(row["gold"]), text) for row, text in zip(rows, bare, strict=True)], f"real: {name}"


def _against_math_verify(
    peer: Peer, key: str, title: str, pairs: Sequence[Pair], source: str, options: Options
) -> Comparison:
    with _pool() as rubric:
        values = take_turns(
            {
                "ours": lambda: len(pairs) / _seconds(rubric, pairs),
                "theirs": lambda: len(pairs) / peer.ask(list(pairs)),
            },
            rounds=options.pick(3, 1),
            warmup=1,
        )
    return Comparison(
        key=key,
        title=title,
        unit="answers/s per core",
        ours=Series(name="accuracy in a pool of one process", values=values["ours"]),
        peers=(Series(name="math-verify in one process", values=values["theirs"]),),
        goal=5.0 if key == "grading-gsm8k" else 1.0,
        notes={
            "answers": f"{len(pairs)}, {source}",
            "ours": "with the way to the worker process and back, a deadline per answer",
        },
    )


def _with_bombs(pairs: Sequence[Pair], options: Options) -> Comparison:
    draw = random.Random(options.seed)
    mixed = [
        (gold, f"\\boxed{{{draw.choice(_BOMBS)}}}") if draw.random() < _BOMB_SHARE else (gold, text)
        for gold, text in pairs
    ]
    many = options.pick(100_000, 4_000)
    with _pool() as rubric:
        rates = take_turns(
            {
                "bombs": lambda: len(mixed) / _seconds(rubric, mixed),
                "none": lambda: len(pairs) / _seconds(rubric, pairs),
            },
            rounds=options.pick(3, 1),
        )
        before = _footprint()
        for _ in range(0, many, len(pairs)):
            _seconds(rubric, pairs)
        after = _footprint()
    return Comparison(
        key="grading-bombs",
        title=f"Verifier pool with {_BOMB_SHARE:.0%} of the answers bombs against none",
        unit="answers/s per core",
        ours=Series(name="with bombs", values=rates["bombs"]),
        peers=(Series(name="without", values=rates["none"]),),
        reading="of the rate",
        notes={
            "bombs": f"{len(_BOMBS)} kinds; an answer may take {_LIMIT_S:g} s",
            "growth": f"over {many} further gradings the memory of all processes went from {before[0] / 2**20:.0f} to "
            f"{after[0] / 2**20:.0f} MiB, their number from {before[1]} to {after[1]}",
        },
    )


def _pool() -> Rubric:
    function = RewardConfig(path="accuracy", params={"limit_s": _LIMIT_S})
    rubric = Rubric(RubricConfig(functions=(function,), processes=1, max_error_rate=1.0), forced_think=False)
    rubric.ready()
    return rubric


def _seconds(rubric: Rubric, pairs: Sequence[Pair]) -> float:
    groups = list(_groups(pairs))
    began = time.perf_counter()
    for _ in rubric.score(groups):
        pass
    return time.perf_counter() - began


def _groups(pairs: Sequence[Pair]) -> Iterable[RolloutGroup]:
    """One problem with one answer each."""
    for number in range(len(pairs)):
        gold, text = pairs[number]
        completion = Completion(
            prompt_token_ids=(0,), token_ids=(0,), text=text, rollout_logprobs=(0.0,), finish_reason=FinishReason.STOP,
            policy_version=0, sample_index=0, seed=0,
        )  # fmt: skip
        yield RolloutGroup(
            problem=Problem(id=str(number), prompt="", answer=gold), rollouts=(Rollout(completion=completion),)
        )


def _footprint() -> tuple[int, int]:
    """Bytes that this process and its children hold, and how many they are."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_info().rss for process in processes), len(processes)
