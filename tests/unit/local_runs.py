"""Whole runs in this process: the real stages, learner, run folder and checkpoints; the engine is a scripted one.

What the engine says has the learner's own log-probabilities, with noise in place of another kernel's rounding.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from pipelines.config import load_recipe
from pipelines.learner_service import LearnerService
from pipelines.rollout_pool import Job, SyncReport, _size
from pipelines.run import run_recipe
from pipelines.workers import Workers
from rewards.rubric import weighted_reward
from rollout.scripted_engine import Scripted, ScriptedEngine
from rollout.types import Problem, Rollout, RolloutGroup
from tests.unit.test_learner_service import SMALL

RECIPE: dict[str, Any] = {
    "name": "local",
    "seed": 3,
    "model": {"preset": "tiny", "overrides": SMALL},
    "engine": {"max_model_len": 64},
    "stages": [
        {
            "kind": "sft", "data": {"source": "jsonl:rows.jsonl"}, "template": "raw", "steps": 5, "batch_size": 4,
            "log_every": 2, "optimizer": {"lr": 3e-3},
        },
        {
            "kind": "grpo", "data": {"source": "jsonl:rows.jsonl"}, "template": "raw", "steps": 6,
            "problems_per_step": 3, "group_size": 3, "mini_batches": 2, "sampling": {"max_tokens": 10},
            "rewards": {"functions": [{"path": "random", "weight": 0.5}, {"path": "repetition", "weight": 0.1}]},
            "optimizer": {"lr": 1e-3, "schedule": "linear"}, "learner": {"micro_batch_tokens": 40},
            "loss": {"kl_coef": 0.05},
        },
    ],
    "run": {"checkpoint_every": 2, "keep_checkpoints": 1, "checkpoint_background": False, "cpus": 1},
    "tracking": {"console": False},
}  # fmt: skip

Fault = Callable[["Local", int], None]


class Local(Workers):
    """Workers of one process.

    Attributes:
        service: the learner.
        service_class: what kind of.
        before_step: called with the number of learner steps that were asked for, before each.
        spoil: changes what the engine says.
    """

    service_class: type[LearnerService] = LearnerService
    before_step: Fault = staticmethod(lambda workers, step: None)
    spoil: Callable[[Problem, Scripted], Scripted] = staticmethod(lambda problem, said: said)

    def __init__(self, recipe: Any, run: Any, problems: Any) -> None:
        self.seed, self.run, self._recipe, self._engine = recipe.seed, run, recipe, recipe.engine
        self._problems = problems
        self.base_version = self.asked = 0
        self.service = self.service_class(recipe.model, recipe.seed, 1)
        self._ask_learner("load")
        self.tokenizer = self.service.tokenizer
        self._pool: Any = SimpleNamespace(generate=self._generate, check_starting=lambda: None)
        self.engine: ScriptedEngine

    def close(self) -> None:
        self._ask_learner("close")

    def start_engines(self) -> None:
        pass

    def sync_weights(self, step: int) -> SyncReport:
        update = self._ask_learner("publish", self.base_version + step, "shm", f"local-{os.getpid()}", 1)
        self.version = update.version
        return SyncReport(version=update.version, seconds=0.25, bytes=_size(update), mean_abs=1e-7, max_abs=1e-6,
                          checksum=update.checksum)  # fmt: skip

    def _ask_learner(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if method in ("grpo_step", "sft_step"):
            self.before_step(self, self.asked)
            self.asked += 1
        return getattr(self.service, method)(*args, **kwargs)

    def _generate(self, jobs: Sequence[Job]) -> Iterator[RolloutGroup]:
        for job in reversed(jobs):
            engine = ScriptedEngine(lambda prompt, seed, job=job: self.spoil(job.problem, self._say(prompt, seed)))
            engine._version = self.version
            completions = asyncio.run(engine.generate(job.requests, job.params))
            yield RolloutGroup(problem=job.problem, rollouts=tuple(Rollout(completion=c) for c in completions))

    def _say(self, prompt: tuple[int, ...], seed: int) -> Scripted:
        draw = random.Random(seed)
        tokens = tuple(draw.randrange(9, 320) for _ in range(draw.randint(1, 12)))
        [scored] = self._ask_learner("sequence_logprobs", [[*prompt, *tokens]])
        noisy = tuple(p + draw.gauss(0, 1e-4) for p in scored[len(prompt) - 1 :])
        return Scripted(token_ids=tokens, text="x" * len(tokens), logprobs=noisy)

    def _rubric(self, *_: Any) -> Any:
        return SimpleNamespace(score=self._score)

    def _score(self, groups: Iterable[RolloutGroup]) -> Iterator[RolloutGroup]:
        for group in groups:
            yield replace(group, rollouts=tuple(self._scored(rollout) for rollout in group.rollouts))

    def _scored(self, rollout: Rollout) -> Rollout:
        draw = random.Random(rollout.completion.seed)
        length = len(rollout.completion.token_ids)
        scores = {"random": draw.random(), "repetition": 1 / length}
        scored = replace(rollout, scores=scores, metrics={"repetition/tokens": float(length)})
        return replace(scored, reward=weighted_reward(scored, self._recipe.stages[1].rewards))


def write_recipe(folder: Path, **stages: dict[str, Any]) -> Path:
    """The recipe and its rows in ``folder``; ``sft`` and ``grpo`` change keys of the stages, ``top`` others."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(1, 7) for b in range(1, 6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = json.loads(json.dumps(RECIPE))
    content.update(stages.pop("top", {}))
    for stage in content["stages"]:
        stage.update(stages.get(stage["kind"], {}))
    path = folder / "local.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run_local(folder: Path, monkeypatch: Any, workers: type[Local] = Local, **stages: Any) -> Path:
    """Runs the recipe in ``folder``, or goes on with it; returns the run folder."""
    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.workers.Workers", workers)
        run_recipe(load_recipe(str(write_recipe(folder, **stages)), ["run.dir=runs"]))
    return Path("runs/local")
