"""The ``grpo`` stage. ``train_grpo`` is the page where policy, rollout and rewards meet.

The trip of one step: problems -> rollouts -> scores -> advantages -> learner step -> weight sync -> evaluation -> log
-> checkpoint. Which GRPO loss is taken stands in ``policy/loss.py``, what each metric means in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from pipelines.bad_steps import check_groups
from pipelines.evaluate import HeldoutSet, evaluate_sets
from policy.advantages import AdvantageStats, group_advantages
from policy.config import AdvantageConfig, LearnerConfig, LossConfig, OptimizerConfig, RouterConfig
from rewards.rubric import RubricConfig, reward_metrics
from rollout.prompts import DataConfig, PromptStream
from rollout.template import check_template
from rollout.types import FinishReason, Problem, RolloutGroup, SamplingParams

if TYPE_CHECKING:
    from pipelines.rollout_pool import SyncReport
    from pipelines.run_dir import StageDir
    from pipelines.tracking import Tracker
    from pipelines.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Gate:
    """RL starts only when an earlier evaluation was clearly above this.

    Attributes:
        set: name of a held-out set of an earlier ``eval`` stage.
        min_pass_at_1: the lower end of its 95 % interval must exceed this, [0, 1].
    """

    set: str
    min_pass_at_1: float

    def __post_init__(self) -> None:
        if not 0 <= self.min_pass_at_1 <= 1:
            raise ValueError(f"min_pass_at_1 must be in [0, 1], got {self.min_pass_at_1}")


@dataclass(frozen=True, kw_only=True)
class GrpoStage:
    """Reinforcement learning by group-relative policy optimisation.

    Attributes:
        kind, name: the stage's kind and the name of its folder.
        data: training problems; the held-out problems of every stage are removed from them.
        steps: rollout batches (each is one rollout -> learner -> sync round).
        problems_per_step: problems drawn for one step.
        group_size: samples per problem, >= 2 (an advantage needs siblings).
        mini_batches: optimizer steps per rollout batch.
        template: how a prompt is rendered: ``chat`` | ``r1-zero`` | ``raw``.
        sampling: how rollouts are drawn (top_p 1 and top_k 0: the learner must know the sampler's distribution).
        rewards: reward functions and their failure policy.
        advantages, loss, optimizer, learner, router: see their own descriptions.
        truncated: ``mask`` leaves truncated completions out of the loss, ``keep`` trains on them.
        stop_without_signal: stop early when at least this share of a step's groups carries no gradient (all rewards
            equal, or fewer than two of them), (0, 1); null never stops.
        eval_every: evaluate ``eval_sets`` every n steps on the live engines; 0 never.
        eval_sets: held-out sets for evaluations during training; needs eval_every.
        gate: refuse to start below a measured accuracy.
    """

    kind: str = "grpo"
    name: str = "grpo"
    data: DataConfig
    rewards: RubricConfig
    steps: int
    problems_per_step: int = 32
    group_size: int = 8
    mini_batches: int = 1
    template: str = "chat"
    sampling: SamplingParams = field(default_factory=SamplingParams)
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    truncated: str = "keep"
    stop_without_signal: float | None = None
    eval_every: int = 0
    eval_sets: tuple[HeldoutSet, ...] = ()
    gate: Gate | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "problems_per_step", "mini_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.group_size < 2:
            raise ValueError(
                f"group_size must be >= 2, got {self.group_size}: an advantage compares siblings of one problem"
            )
        check_template(self.template)
        if self.truncated not in ("mask", "keep"):
            raise ValueError(f"truncated must be mask or keep, got {self.truncated!r}")
        if self.sampling.temperature <= 0 or self.sampling.top_p < 1 or self.sampling.top_k:
            raise ValueError(
                "sampling for grpo needs temperature > 0, top_p 1 and top_k 0: "
                "otherwise the learner cannot recompute the sampler's log-probabilities"
            )
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be >= 0 (0 never evaluates), got {self.eval_every}")
        if bool(self.eval_every) != bool(self.eval_sets):
            raise ValueError(
                f"eval_every is {self.eval_every} and eval_sets has {len(self.eval_sets)} sets: evaluations during "
                "training need both"
            )
        if self.stop_without_signal is not None and not 0 < self.stop_without_signal < 1:
            raise ValueError(f"stop_without_signal must be in (0, 1) or null, got {self.stop_without_signal}")
        if self.stop_without_signal is not None and not self.advantages.drop_zero_variance:
            raise ValueError("stop_without_signal needs advantages.drop_zero_variance: otherwise every group trains")


def train_grpo(
    stage: GrpoStage, workers: Workers, prompts: PromptStream, folder: StageDir, tracker: Tracker
) -> dict[str, Any]:
    """Runs the stage from its last checkpoint to its end; returns its headline figures.

    *Consumes* problems; each step *waits for* all of its groups; staleness is 0 by construction and measured
    anyway. A step whose rollouts are in the run folder is not drawn again, so a killed run continues exactly.

    Raises:
        AttestationError: the engines do not hold the learner's weights.
        RewardFailure: a reward function failed too often.
        WorkerFailure: rollout workers were lost too often.
        NonFiniteError: too many optimizer steps in a row were not finite.
    """
    workers.begin_stage(
        stage.optimizer, stage.loss, stage.learner, stage.router, total_steps=stage.steps * stage.mini_batches
    )
    start = workers.resume(folder, prompts)
    sync = workers.sync_weights(start)
    for step in range(start, stage.steps):
        if exhausted(stage, tracker.row(step - 1)):  # asked of what was logged: a resumed run stops where it stopped
            folder.note({"event": "stopped_early", "step": step - 1, "reason": "hardly any group carries a gradient"})
            break
        clock = tracker.clock(step)
        problems = prompts.next(stage.problems_per_step)
        with clock("rollout"):
            groups, drawn_tokens = workers.rollouts(stage, step, problems, folder)
        tracker.sample(step, groups[0])
        groups, signal = group_advantages(groups, stage.advantages)
        with clock("journal"):
            folder.complete_step(step, groups)
        with clock("learner"):
            learned = workers.learner_step(stage, groups)
        check_groups(stage, workers, folder, step, learned, groups)
        with clock("sync"):
            sync = workers.sync_weights(step + 1)
        evaluated: dict[str, float] = {}
        if stage.eval_every and (step + 1) % stage.eval_every == 0:
            with clock("eval"):
                found = evaluate_sets(stage.eval_sets, workers, folder, tag=f"step-{step + 1:06d}")
                evaluated = tracker.log_eval(step, found)
        drawn = step_metrics(stage, groups, signal, sync, drawn_tokens, clock.seconds("rollout"))
        tracker.log(step, {**drawn, **learned, **evaluated, **clock.metrics()})
        # Last: a step is repeated from its stored rollouts until its checkpoint is whole, so nothing before is skipped.
        with clock("checkpoint"):
            last = step + 1 == stage.steps or exhausted(stage, tracker.row(step))
            workers.checkpoint(folder, step + 1, prompts, last=last)
    workers.export(folder)
    return tracker.headline("reward/pass_rate", "reward/mean", "mismatch/mean_abs", "mismatch/max_abs") | {
        "policy_version": sync.version
    }


def exhausted(stage: GrpoStage, row: Mapping[str, float]) -> bool:
    """Whether the metrics of a step say that the stage has hardly anything left to learn from."""
    if stage.stop_without_signal is None or not row:
        return False
    return 1 - row["groups/trained"] / row["groups/total"] >= stage.stop_without_signal


def step_metrics(
    stage: GrpoStage,
    groups: Sequence[RolloutGroup],
    signal: AdvantageStats,
    sync: SyncReport,
    drawn_tokens: int,
    seconds: float,
) -> dict[str, float]:
    """What one step's rollouts, advantages and sync looked like; each name is declared in pipelines/tracking.py.

    Args:
        stage: whose rewards these are.
        groups: scored, with advantages.
        signal: what became of the groups.
        sync: the weight sync after the step.
        drawn_tokens: sampled in this process; fewer than the groups hold when some were in the run folder.
        seconds: of the rollout phase.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    lengths = sorted(len(r.completion.token_ids) for r in rollouts)
    metrics = {
        "rollout/samples": float(len(rollouts)),
        "rollout/length_mean": sum(lengths) / len(lengths),
        "rollout/length_p50": float(median(lengths)),
        "rollout/length_max": float(lengths[-1]),
        "rollout/truncated": _share(r.completion.finish_reason is FinishReason.LENGTH for r in rollouts),
        "rollout/tokens_per_s": drawn_tokens / seconds if seconds else 0.0,
        "staleness/max": float(sync.version - 1 - min(r.completion.policy_version for r in rollouts)),
        "sync/seconds": sync.seconds,
        "sync/bytes": float(sync.bytes),
        "sync/canary_mean_abs": sync.mean_abs,
        "sync/canary_max_abs": sync.max_abs,
        "sync/version": float(sync.version),
        **signal.metrics(),
    }
    return metrics | reward_metrics(groups, stage.rewards)


def check_gate(gate: Gate | None, results: dict[str, Any]) -> None:
    """Refuses to start RL when the cold start is not clearly above the gate.

    Args:
        results: ``{set: {"ci95": [lo, hi], …}}`` of the latest evaluation.

    Raises:
        ValueError: the set was not evaluated, or its interval reaches below the gate.
    """
    if gate is None:
        return
    if gate.set not in results:
        raise ValueError(
            f"gate.set {gate.set!r} was not evaluated before this stage (was: {', '.join(results) or 'nothing'}): "
            "put an eval stage with that set before it"
        )
    low = results[gate.set]["ci95"][0]
    if low <= gate.min_pass_at_1:
        raise ValueError(
            f"RL does not start: pass@1 on {gate.set!r} is {results[gate.set]['pass_at_1']:.3f} and its 95 % interval "
            f"begins at {low:.3f}, not above the gate of {gate.min_pass_at_1:g}; train the cold start longer, or "
            "set the stage's gate to null (gate: null) to go on all the same"
        )


def in_order(groups: Sequence[RolloutGroup], problems: Sequence[Problem]) -> list[RolloutGroup]:
    """Groups in the order of their problems, whatever order they finished in (the learner's sums depend on it)."""
    by_id = {group.problem.id: group for group in groups}
    return [by_id[problem.id] for problem in problems]


def _share(flags: Any) -> float:
    values = [bool(flag) for flag in flags]
    return sum(values) / len(values) if values else 0.0
