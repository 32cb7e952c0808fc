"""What the policy package measures: every metric, declared once. Standard library only: recipes load without torch.

``{i}`` in a name stands for the index of a layer of the model.
"""

from __future__ import annotations

LEARNER_METRICS: dict[str, str] = {
    "learner/loss": "The loss that was minimised, mean over the optimizer steps of this batch (dimensionless).",
    "learner/grad_norm": "Global L2 norm of the gradient before clipping, mean over the optimizer steps of this batch.",
    "learner/lr": "Learning rate of the last optimizer step.",
    "learner/clip_fraction_low": "Share of trained tokens with a ratio below 1 - clip_low and a negative advantage.",
    "learner/clip_fraction_high": "Share of trained tokens with a ratio above 1 + clip_high and a positive advantage.",
    "learner/entropy": "Mean entropy of the policy's next-token distribution on the trained tokens, nats.",
    "learner/kl_ref": "Mean KL term to the reference policy as it enters the loss, before kl_coef, nats per token.",
    "learner/approx_kl": "Mean k3 estimate of KL(old policy || current policy) on the trained tokens, nats per token.",
    "learner/ratio_max": "Largest importance ratio exp(logprobs - old_logprobs) of the batch.",
    "learner/tokens": "Tokens that went through the policy for this batch, prompts included, padding excluded.",
    "learner/loss_tokens": "Sampled (or demonstrated) tokens under the loss.",
    "learner/sequences": "Sequences under the loss.",
    "learner/pack_fill": "Share of the micro-batches' places (micro_batch_tokens each) that held tokens, 0 to 1.",
    "learner/tokens_per_s": "learner/tokens over the seconds of the whole call.",
    "learner/optimizer_steps": "Optimizer steps taken since the stage began.",
    "learner/skipped": "1 when the batch held nothing to learn from and no optimizer step was taken, else 0.",
    "learner/bad_steps": "Optimizer steps of this batch that were skipped because something was NaN or infinite "
    "(events.jsonl says what); they count in no other figure.",
    "mismatch/mean_abs": "Mean |old_logprobs - rollout_logprobs| over the trained tokens, nats.",
    "mismatch/max_abs": "Largest |old_logprobs - rollout_logprobs| of the batch, nats.",
    "mismatch/k3": "Mean k3 estimate of KL(sampler || learner before the update), nats per token.",
    "mismatch/capped_fraction": "Share of trained tokens whose importance weight was cut at importance_cap.",
    "learner/balance_loss": "Sequence-wise balance loss, summed over MoE layers (1 each when balanced), before "
    "balance_coef, mean over sequences.",
    "router/load_max_over_mean/layer_{i}": "Tokens of the busiest expert over the mean of all experts, 1 is balanced.",
    "router/load_entropy/layer_{i}": "Entropy of the experts' shares of the tokens over its maximum: 1 is balanced, 0 "
    "one expert alone.",
    "router/dead_experts/layer_{i}": "Experts that no token of this batch was sent to.",
    "router/score_entropy/layer_{i}": "Mean entropy of a token's expert scores over their sum, nats; ln(E) is even.",
    "router/replay_agreement/layer_{i}": "Share of the replayed expert choices that the learner's own router makes too "
    "(see router/replay_agreement).",
    "router/replay_agreement": "Share of the replayed expert choices of all layers that the learner's routers make "
    "too; the first mini-batch compares learner and sampler, each later one a learner that has moved.",
}

LEARNER_TIMES = frozenset({"learner/tokens_per_s"})
"""Those of them that depend on how fast the machine was."""

LEARNER_OF_THE_CUT = frozenset({"learner/pack_fill"})
"""Those that depend on how many ranks share a batch; all others are the same whenever and however it is computed."""

ADVANTAGE_METRICS: dict[str, str] = {
    "advantage/mean": "Mean advantage over the rollouts that have one (truncated ones too, whether masked or not).",
    "advantage/std": "Standard deviation (n - 1) of the advantages.",
    "advantage/min": "Smallest advantage of the batch.",
    "advantage/max": "Largest advantage of the batch.",
    "groups/total": "Groups in the batch.",
    "groups/trained": "Groups whose rollouts have advantages.",
    "groups/dropped_zero_variance": "Groups left out because all their rewards are equal.",
    "groups/dropped_unscored": "Groups left out because fewer than two of their rollouts have a reward.",
    "groups/all_positive": "Groups whose scored rollouts all have a reward above 0.",
    "groups/none_positive": "Groups none of whose scored rollouts has a reward above 0.",
    "rollouts/positive_share": "Share of the scored rollouts with a reward above 0.",
}
