"""Group advantages: a rollout is better or worse than its siblings. Standard library only; values in, values out.

    A_i = (r_i - mean_group(r)) / (s + epsilon)         s = std of the group, std of the batch, or A_i = r_i - mean

Sources: GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2) divides by the group's std; Dr. GRPO (arXiv 2503.20783)
shows that this favours questions that are nearly always or nearly never solved, and does not divide; dividing by
the std of the whole batch is the middle way.

Convention of every std here: the sample standard deviation, ddof = 1 (n - 1 in the denominator). The papers do not
say; torch.std and TRL use it, and so results can be compared. At group size 8 it makes advantages 6.5 % smaller
than ddof = 0 would.

Deviations from the papers:
    1. A rollout without a reward (its reward function failed) is left out of the mean and the std and never trains;
       a failure is not a reward of 0.
    2. A group whose rewards are all equal has no gradient; it is dropped and counted (DAPO, arXiv 2503.14476,
       samples others in its place; that is for the caller to do).
    3. The batch std is over all scored rollouts, those of dropped groups included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from policy.config import AdvantageConfig
from rollout.types import Rollout, RolloutGroup

# Rewards are weighted sums: equal ones may differ in the last bits (0.1 + 0.2 against 0.3).
_EQUAL = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvantageStats:
    """What became of a batch of groups.

    Attributes:
        groups: groups in the batch.
        trained_groups: groups whose scored rollouts got an advantage.
        dropped_zero_variance: groups dropped because their rewards are all equal.
        dropped_unscored: groups dropped because fewer than two rollouts have a reward.
        all_positive, none_positive: groups whose scored rollouts all / never have a reward above 0 (dropped
            or not, without those that have no scored rollout).
        rollouts, unscored_rollouts, positive_rollouts: rollouts in the batch, without a reward, with one above 0.
        mean, std, min, max: over the advantages that were given out (ddof 1); 0.0 when there are none.
    """

    groups: int
    trained_groups: int
    dropped_zero_variance: int
    dropped_unscored: int
    all_positive: int
    none_positive: int
    rollouts: int
    unscored_rollouts: int
    positive_rollouts: int
    mean: float
    std: float
    min: float
    max: float

    def metrics(self) -> dict[str, float]:
        """The same as metrics, names as in ``policy.glossary.ADVANTAGE_METRICS``."""
        scored = self.rollouts - self.unscored_rollouts
        return {
            "advantage/mean": self.mean,
            "advantage/std": self.std,
            "advantage/min": self.min,
            "advantage/max": self.max,
            "groups/total": float(self.groups),
            "groups/trained": float(self.trained_groups),
            "groups/dropped_zero_variance": float(self.dropped_zero_variance),
            "groups/dropped_unscored": float(self.dropped_unscored),
            "groups/all_positive": float(self.all_positive),
            "groups/none_positive": float(self.none_positive),
            "rollouts/positive_share": self.positive_rollouts / scored if scored else 0.0,
        }


def group_advantages(
    groups: Sequence[RolloutGroup], config: AdvantageConfig
) -> tuple[list[RolloutGroup], AdvantageStats]:
    """Fills ``Rollout.advantage`` from ``Rollout.reward``.

    Rollouts without a reward, and all rollouts of a dropped group, have advantage None and do not train.

    Args:
        groups: siblings of one problem each; any number of rollouts per group.
        config: how to scale and what to drop.

    Returns:
        New groups in the same order, and what became of them.

    Raises:
        ValueError: a reward is NaN or infinite.
    """
    rewards = [_scored(group) for group in groups]
    everything = [r for values in rewards for r in values]
    batch_std = sample_std(everything)
    filled: list[RolloutGroup] = []
    given: list[float] = []
    trained = zero_variance = unscored = 0
    for group, values in zip(groups, rewards, strict=True):
        keep = False
        if len(values) < 2:
            unscored += 1
        elif config.drop_zero_variance and _all_equal(values):
            zero_variance += 1
        else:
            keep = True
            trained += 1
        rollouts = _with_advantages(group.rollouts, values, config, batch_std) if keep else _without(group.rollouts)
        given += [r.advantage for r in rollouts if r.advantage is not None]
        filled.append(replace(group, rollouts=rollouts))
    rollouts_total = sum(len(group.rollouts) for group in groups)
    stats = AdvantageStats(
        groups=len(groups),
        trained_groups=trained,
        dropped_zero_variance=zero_variance,
        dropped_unscored=unscored,
        all_positive=sum(1 for values in rewards if values and min(values) > 0),
        none_positive=sum(1 for values in rewards if values and max(values) <= 0),
        rollouts=rollouts_total,
        unscored_rollouts=rollouts_total - len(everything),
        positive_rollouts=sum(1 for r in everything if r > 0),
        mean=math.fsum(given) / len(given) if given else 0.0,
        std=sample_std(given),
        min=min(given, default=0.0),
        max=max(given, default=0.0),
    )
    return filled, stats


def sample_std(values: Sequence[float]) -> float:
    """Standard deviation with n - 1 in the denominator; 0.0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _scored(group: RolloutGroup) -> list[float]:
    values = [r.reward for r in group.rollouts if r.reward is not None]
    for value in values:
        if not math.isfinite(value):
            raise ValueError(
                f"the reward of problem {group.problem.id!r} is {value}: a reward function must return a finite "
                "number, or None when it does not apply"
            )
    return values


def _all_equal(values: Sequence[float]) -> bool:
    low, high = min(values), max(values)
    return high - low <= _EQUAL * max(1.0, abs(low), abs(high))


def _with_advantages(
    rollouts: tuple[Rollout, ...], values: Sequence[float], config: AdvantageConfig, batch_std: float
) -> tuple[Rollout, ...]:
    mean = math.fsum(values) / len(values)
    if config.scale == "none":
        divisor = 1.0
    else:
        divisor = (sample_std(values) if config.scale == "group" else batch_std) + config.epsilon
    if _all_equal(values):  # kept on request: exactly no gradient, also when epsilon is 0
        return tuple(replace(r, advantage=None if r.reward is None else 0.0) for r in rollouts)
    return tuple(replace(r, advantage=None if r.reward is None else (r.reward - mean) / divisor) for r in rollouts)


def _without(rollouts: tuple[Rollout, ...]) -> tuple[Rollout, ...]:
    return tuple(replace(r, advantage=None) for r in rollouts)
