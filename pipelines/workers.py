"""``Workers`` = rollouts + rewards + learner: what a stage asks, in the order in which it asks.

The driver holds one of these for a whole run. The learner and the engines live in Ray actors; the engines start
while the first training stage is already running.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.actors import Handle, settle
from pipelines.bad_steps import pinned
from pipelines.grpo import GrpoStage, in_order
from pipelines.launch import Launcher
from pipelines.learner_group import start_learner
from pipelines.resources import check_gpus, count_gpus, own_cores, start_ray
from pipelines.rollout_pool import Job, RolloutPool, SyncReport, WeightSource, canary_prompts
from pipelines.run_dir import Journal, step_name
from pipelines.sft import encode_demonstration
from pipelines.stored_groups import check_stored
from policy.checkpoint import CheckpointError, latest_checkpoint, prune
from policy.config import LearnerConfig, LossConfig, OptimizerConfig, RouterConfig
from rewards.rubric import Rubric, RubricConfig
from rollout.engine import EngineConfig, EngineDied, GenerateRequest
from rollout.template import forces_thinking, prompt_text, render_prompt
from rollout.types import Problem, RolloutGroup, SamplingParams, sampling_seed

if TYPE_CHECKING:
    from pipelines.config import Recipe
    from pipelines.evaluate import HeldoutSet
    from pipelines.problem_sets import ProblemSets
    from pipelines.run_dir import RunDir, StageDir
    from policy.guards import BadUpdate
    from rollout.prompts import PromptStream

_EVAL_STEP = -1  # held-out sets are drawn with the same seeds before and after training
_CLOSE_S = 10.0


class LearnerDied(RuntimeError):
    """The learner's process is gone; the run folder is whole."""


def _quiet(samples: int) -> None:
    """Shows no progress."""


class Workers:
    """The processes of a run behind one object.

    Args:
        recipe: the resolved recipe.
        run: its run folder.
        problems: the recipe's data.
    """

    def __init__(self, recipe: Recipe, run: RunDir, problems: ProblemSets) -> None:
        from transformers import AutoTokenizer

        self.seed, self.run, self._recipe, self._engine = recipe.seed, run, recipe, engine_config(recipe)
        self._problems = problems
        self.base_version = 0
        self._rubrics: dict[str, Rubric] = {}
        self._cores = own_cores(recipe.run.cpus)
        start_ray(recipe.run.ray_address, len(self._cores))
        check_gpus(self._engine, count_gpus(), recipe.parallel.ranks)
        self._learner: Handle = start_learner(recipe.model, recipe.seed, recipe.parallel, len(self._cores))
        if told := self._ask_learner("load"):
            run.note(told)
        self._seed_folder = run.path / "engine"
        self._ask_learner("export", str(self._seed_folder))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self._seed_folder)
        launch = Launcher(folder=self._seed_folder, engine=self._engine, dtype=recipe.model.dtype, seed=recipe.seed,
                          cores=self._cores, learners=recipe.parallel.ranks)  # fmt: skip
        self._count = launch.count()
        self._pool = RolloutPool(launch, self._engine, self._count, run.note)
        asked, template = problems.canary()
        prompts = [list(render_prompt(problem, self.tokenizer, template)) for problem in asked]
        self._canary = canary_prompts(prompts, self.tokenizer, self._engine.max_model_len, self.seed)

    # -- stages ---------------------------------------------------------------------------------------------------

    def start_engines(self) -> None:
        """Begins to start the rollout workers; returns at once."""
        self._pool.start()

    def load_model(self, folder: Path) -> None:
        """The learner takes over the weights that an earlier stage left."""
        self._ask_learner("load_model", str(folder))

    def begin_stage(
        self,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        learner: LearnerConfig,
        router: RouterConfig,
        total_steps: int,
    ) -> None:
        """A fresh optimizer and schedule for a training stage."""
        self._ask_learner(
            "begin", optimizer=optimizer, loss=loss, config=learner, router=router, total_steps=total_steps
        )

    def resume(self, folder: StageDir, prompts: PromptStream) -> int:
        """Takes up the stage's last checkpoint; returns the step to go on with (0 when there is none)."""
        latest = latest_checkpoint(folder.checkpoints)
        if latest is None:
            return 0
        extra = self._ask_learner("restore", str(latest))
        prompts.restore(extra["prompts"])
        self.run.note({"event": "resumed", "stage": folder.name, "step": extra["step"]})
        return extra["step"]

    def checkpoint(self, folder: StageDir, step: int, prompts: PromptStream, *, last: bool) -> None:
        """Writes a complete state every ``run.checkpoint_every`` steps and after the last; keeps the newest few.

        In the background unless it is the last one: what went wrong with one is told when the next is due.

        Raises:
            CheckpointError: this checkpoint or the one before it could not be written.
        """
        run, name = self._recipe.run, step_name(step)
        if step % run.checkpoint_every and not last:
            return
        extra = {"step": step, "prompts": prompts.state()}
        background = run.checkpoint_background and not last
        self._ask_learner("save", str(folder.checkpoints / name), extra, background=background)
        keep = run.keep_checkpoints
        prune(folder.checkpoints, keep, also=pinned(folder.path, keep), writing=name if background else None)

    def bad_updates(self) -> Sequence[BadUpdate]:
        """What the last step skipped because it was not finite."""
        return self._ask_learner("bad_updates")

    def export(self, folder: StageDir) -> None:
        """Leaves the stage's result as a Hugging Face folder."""
        self._ask_learner("export", str(folder.model))

    # -- supervised ----------------------------------------------------------------------------------------------

    def encode_demonstration(self, problem: Problem, text: str, template: str) -> tuple[list[int], int]:
        """``(token ids, prompt length)`` of a prompt followed by ``text`` and the end-of-sequence token.

        Raises:
            ValueError: longer than ``engine.max_model_len``.
        """
        return encode_demonstration(problem, text, template, self.tokenizer, self._engine.max_model_len)

    def sft_step(self, rows: Sequence[tuple[Sequence[int], int]]) -> dict[str, float]:
        """One supervised step; returns the learner's metrics."""
        self._pool.check_starting()
        return self._ask_learner("sft_step", rows)

    # -- reinforcement --------------------------------------------------------------------------------------------

    def rollouts(
        self,
        stage: GrpoStage,
        step: int,
        problems: Sequence[Problem],
        folder: StageDir,
        advance: Callable[[int], None] = _quiet,
    ) -> tuple[list[RolloutGroup], int]:
        """The step's scored groups in the order of its problems, and how many tokens were drawn for them now.

        What the run folder holds is not drawn again.
        """
        return self._draw(
            problems, folder.journal(step_name(step)), step, stage.group_size, stage.sampling, stage.template,
            stage.rewards, advance,
        )  # fmt: skip

    def heldout_rollouts(
        self,
        item: HeldoutSet,
        folder: StageDir,
        *,
        tag: str,
        greedy: bool,
        advance: Callable[[int], None] = _quiet,
    ) -> list[RolloutGroup]:
        """Scored groups of a held-out set under the current weights; finished ones are not drawn again."""
        problems = self._problems.heldout(item)
        samples = 1 if greedy else item.samples
        sampling = replace(item.sampling, temperature=0.0, top_p=1.0, top_k=0) if greedy else item.sampling
        journal = folder.journal(f"{tag}-{item.name}-{'greedy' if greedy else 'sampled'}")
        groups, _ = self._draw(problems, journal, _EVAL_STEP, samples, sampling, item.template, item.rubric, advance)
        journal.complete(groups)
        return groups

    def learner_step(self, stage: GrpoStage, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Packs the groups and takes the step's optimizer steps; returns the learner's metrics."""
        return self._ask_learner(
            "grpo_step", list(groups), mask_truncated=stage.truncated == "mask", mini_batches=stage.mini_batches,
            temperature=stage.sampling.temperature,
            constant_length=stage.loss.constant_length or stage.sampling.max_tokens,
        )  # fmt: skip

    def sync_weights(self, step: int) -> SyncReport:
        """Publishes the learner's weights and attests them in every worker before its next rollout.

        Raises:
            AttestationError: an engine does not hold the learner's weights.
        """
        version = self.base_version + step
        update = self._ask_learner(
            "publish", version, self._engine.weight_backend, self.run.path.name,
            self._count * self._engine.tensor_parallel,
        )  # fmt: skip
        source = WeightSource(
            update=update, canary=self._canary, dtype=self._recipe.model.dtype,
            score=lambda ids: self._ask_learner("sequence_logprobs", ids, 1.0),
            margins=lambda ids: self._ask_learner("router_margins", ids),
            describe=lambda ids: self.tokenizer.convert_ids_to_tokens(list(ids)),
        )  # fmt: skip
        report = self._pool.sync(source)
        self.run.note({"event": "weights", "version": version, "checksum": report.checksum,
                        "seconds": round(report.seconds, 4), "max_abs": report.max_abs})  # fmt: skip
        return report

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process of the run, whatever state it is in."""
        import ray

        try:
            for rubric in self._rubrics.values():
                rubric.close()
            try:
                settle(self._learner.submit("close"), _CLOSE_S)
            except (EngineDied, TimeoutError):
                pass  # dead, or in the middle of a step: its segments go with the next run
            except CheckpointError as error:  # an unfinished stage ends for another reason, which must be the one told
                self.run.note({"event": "checkpoint_failed", "error": str(error)})
            self._pool.close()
            self._learner.kill()
        finally:
            ray.shutdown()

    def check_prompts(self, problems: Sequence[Problem], template: str) -> None:
        """Refuses problems whose prompt leaves no room in the context, before anything is computed.

        Raises:
            ValueError: names the problem and the lengths.
        """
        if not problems:
            return
        around = len(prompt_text(replace(problems[0], prompt=""), self.tokenizer, template).encode())
        for problem in problems:
            # No tokenizer makes more tokens of a text than it has bytes: the others need not be tokenized.
            if len(problem.prompt.encode()) + around + 1 >= self._engine.max_model_len:
                self._prompt(problem, template)

    # -- leaves ---------------------------------------------------------------------------------------------------

    def _draw(
        self, problems: Sequence[Problem], journal: Journal, step: int, samples: int, sampling: SamplingParams,
        template: str, rewards: RubricConfig, advance: Callable[[int], None],
    ) -> tuple[list[RolloutGroup], int]:  # fmt: skip
        """Scored groups in the order of their problems: finished ones from the journal, the others drawn now.

        Also returns how many tokens were drawn now.

        A group is journaled the moment its last sample ends, before it is scored, so that a kill loses none.

        Raises:
            RunDirError: a stored group holds what no engine and no reward function gives.
        """
        asked = {p.id: p for p in problems}
        finished = self._finished(journal, asked, step, samples)
        for group in finished.values():
            check_stored(journal.path, group, rewards)
        scored = [g for g in finished.values() if any(r.scores or r.errors for r in g.rollouts)]
        advance(sum(len(g.rollouts) for g in finished.values()))
        jobs = [
            Job(problem=p, params=sampling, requests=self._requests(p, step, samples, template))
            for p in asked.values() if p.id not in finished
        ]  # fmt: skip

        def unscored() -> Iterator[RolloutGroup]:
            known = {g.problem.id for g in scored}
            yield from (g for g in finished.values() if g.problem.id not in known)
            for group in self._pool.generate(jobs):
                journal.append(group)
                advance(len(group.rollouts))
                yield group

        rubric = self._rubric(rewards, problems[0], template)
        groups = in_order([*scored, *rubric.score(unscored())], problems)
        return groups, _tokens(g for g in groups if g.problem.id not in finished)

    def _finished(
        self, journal: Journal, asked: Mapping[str, Problem], step: int, samples: int
    ) -> dict[str, RolloutGroup]:
        """The journal's groups that are those that would be drawn now; of the others with too few or other samples,
        says that they are drawn again.
        """
        found: dict[str, RolloutGroup] = {}
        for name, group in journal.finished().items():
            # A group of a problem that reads otherwise now (a gold answer was mended, say) is drawn again.
            if name not in asked or not _same(group.problem, asked[name]):
                continue
            wanted = [(i, sampling_seed(self.seed, step, name, i)) for i in range(samples)]
            kept = [(r.completion.sample_index, r.completion.seed) for r in group.rollouts]
            if kept == wanted:
                found[name] = group
                continue
            reason = f"it holds the samples {[i for i, _ in kept]} of {samples}"
            if sorted(i for i, _ in kept) == list(range(samples)):
                reason = "its samples have other seeds or another order than those that are asked for"
            self.run.note({"event": "drawn_again", "file": str(journal.path), "problem": name, "reason": reason})
        return found

    def _ask_learner(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """What the learner answers.

        Raises:
            LearnerDied: its process is gone.
        """
        try:
            return settle(self._learner.submit(method, *args, **kwargs))
        except EngineDied as error:
            raise LearnerDied(
                f"the learner was lost while it was asked to {method}: {error}; run the same command, it goes on from "
                "the last checkpoint"
            ) from error

    def _prompt(self, problem: Problem, template: str) -> tuple[int, ...]:
        ids = tuple(render_prompt(problem, self.tokenizer, template))
        if len(ids) + 1 > self._engine.max_model_len:
            raise ValueError(
                f"problem {problem.id}: its prompt takes {len(ids)} tokens and leaves no room in the context of "
                f"{self._engine.max_model_len} (engine.max_model_len): raise it or filter the data"
            )
        return ids

    def _requests(self, problem: Problem, step: int, samples: int, template: str) -> tuple[GenerateRequest, ...]:
        ids = self._prompt(problem, template)
        return tuple(
            GenerateRequest(
                prompt_token_ids=ids, sample_index=i, seed=sampling_seed(self.seed, step, problem.id, i),
                routed_experts=self._engine.return_routed_experts and step != _EVAL_STEP,
            )
            for i in range(samples)
        )  # fmt: skip

    def _rubric(self, config: RubricConfig, problem: Problem, template: str) -> Rubric:
        forced = forces_thinking(prompt_text(problem, self.tokenizer, template))
        key = f"{config!r} {forced}"
        if key not in self._rubrics:
            self._rubrics[key] = Rubric(config, forced_think=forced, on_event=self.run.note)
        return self._rubrics[key]


def engine_config(recipe: Recipe) -> EngineConfig:
    """The recipe's engine, which returns the experts of its tokens when a stage replays them."""
    replays = any(isinstance(stage, GrpoStage) and stage.router.replay for stage in recipe.stages)
    return replace(recipe.engine, return_routed_experts=recipe.engine.return_routed_experts or replays)


def _same(kept: Problem, asked: Problem) -> bool:
    """Whether a problem from a journal is the one that is asked now (JSON knows no tuples)."""
    return json.loads(json.dumps(asdict(asked))) == asdict(kept)


def _tokens(groups: Iterable[RolloutGroup]) -> int:
    return sum(len(rollout.completion.token_ids) for group in groups for rollout in group.rollouts)
