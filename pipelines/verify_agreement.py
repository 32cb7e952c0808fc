"""The rows of ``r1 verify`` about engine and learner: log-probabilities, experts, and weights that are sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from pipelines.rollout_pool import CANARY_TOKENS, canary_prompts
from pipelines.verify_engine import EngineProbe, accepted, gaps_of, without_ties
from pipelines.verify_rows import OF_THE_ENGINE, PROPERTIES, Finding, Row, measured, unmeasured
from pipelines.verify_subject import Note, Subject
from pipelines.weight_sync import AttestationError, attest_bytes, tie_margin


def engine_rows(subject: Subject, note: Note) -> Iterator[Row]:
    """Engine and learner: sampled and read tokens, experts, and weights that are sent."""
    wanted = [name for name in OF_THE_ENGINE if name in subject.options.only]
    if subject.engine is None:
        yield from (unmeasured(name, "not applicable: the recipe never samples") for name in wanted)
        return
    measures = {
        "engine_decode": _decode, "engine_prefill": _prefill, "routing": _routing, "weight_sync": _weight_sync,
    }  # fmt: skip
    for name in wanted:
        if name == "routing" and not subject.routed:
            yield unmeasured(name, "not applicable: the model has no mixture of experts of DeepSeek-V3's kind")
            continue
        note(PROPERTIES[name])
        yield measured(name, partial(measures[name], subject, subject.engine))
    subject.close_engine()


def _decode(subject: Subject, engine: EngineProbe) -> Finding:
    """The sampled tokens: the engine's log-probabilities from when it drew them."""
    assert subject.asked is not None
    sequences = [(*c.prompt_token_ids, *c.token_ids) for c in subject.completions]
    mine = subject.service.sequence_logprobs(sequences, subject.asked.sampling.temperature)
    skip = [len(c.prompt_token_ids) - 1 for c in subject.completions]
    return _agreement(subject, [c.rollout_logprobs for c in subject.completions], mine, sequences, skip)


def _prefill(subject: Subject, engine: EngineProbe) -> Finding:
    """The same sequences, read by the engine as prompts."""
    limit = subject.recipe.engine.max_model_len - 1
    sequences = [(*c.prompt_token_ids, *c.token_ids)[:limit] for c in subject.completions]
    mine = subject.service.sequence_logprobs(sequences)
    return _agreement(subject, engine.read(sequences), mine, sequences, None)


def _routing(subject: Subject, engine: EngineProbe) -> Finding:
    """Experts of each token in the engine, while it drew, and in the learner."""
    del engine
    shares = subject.service.routing_agreement(subject.completions)
    margins = subject.service.router_margins([(*c.prompt_token_ids, *c.token_ids) for c in subject.completions])
    tie, dtype = tie_margin(subject.recipe.model.dtype), subject.recipe.model.dtype
    near = [margin < tie for row in margins for margin in row]
    worst = min(shares, key=lambda layer: shares[layer])
    reason = (
        f"{sum(near)} of {len(near)} tokens have a choice as good as a tie in {dtype} (scores within {tie:g}), which "
        "rounding may turn; every other choice must be the same"
    )
    return Finding(
        worst=1.0 - shares[worst], where=f"layer {worst}", tolerance=sum(near) / len(near), reason=reason, unit="share",
        detail={"by_layer": shares, "tokens": len(near)},
    )  # fmt: skip


def _agreement(
    subject: Subject,
    engine: Sequence[Sequence[float]],
    learner: Sequence[Sequence[float]],
    sequences: Sequence[Sequence[int]],
    skip: Sequence[int] | None,
) -> Finding:
    dtype, asked = subject.recipe.model.dtype, subject.recipe.engine.attest_tolerance
    gaps = gaps_of(engine, learner, skip)
    ok, tolerance, reason = accepted(gaps, dtype, asked)
    if not ok:
        gaps = without_ties(gaps, subject.service.router_margins(sequences), dtype, skip)
        ok, tolerance, reason = accepted(gaps, dtype, asked)
    places = [(gap, row, at) for row, found in enumerate(gaps.rows) for at, gap in enumerate(found)]
    _, row, at = max(places, key=lambda place: place[0])
    token = sequences[row][at + 1 + (skip[row] if skip else 0)]
    reads = subject.service.tokenizer.convert_ids_to_tokens([token])[0]
    detail = {
        "mean": gaps.mean, "tokens": gaps.tokens, "left_out_behind_ties": gaps.left_out,
        "by_position": gaps.by_position(),
    }  # fmt: skip
    return Finding(
        worst=gaps.worst, where=f"sample {row + 1}, token {at + 1} ({reads!r})", tolerance=tolerance, reason=reason,
        unit="nats", ok=ok, detail=detail,
    )  # fmt: skip


def _weight_sync(subject: Subject, engine: EngineProbe) -> Finding:
    """Other weights in every tensor are sent; the engine must then compute what the learner does."""
    assert subject.asked is not None
    recipe, service = subject.recipe, subject.service
    service.change_all()
    try:
        update = service.publish(1, recipe.engine.weight_backend, "verify", recipe.engine.tensor_parallel)
        assert update is not None, "of several ranks the first publishes; this is one"
        received = engine.take_over(update)
        prompts = [list(request.prompt_token_ids) for request in subject.asked.requests[:4]]
        answers = engine.canary(
            canary_prompts(prompts, service.tokenizer, recipe.engine.max_model_len, recipe.seed), CANARY_TOKENS
        )
        sequences = [tokens for tokens, _ in answers]
        mine = service.sequence_logprobs(sequences)
        found = _agreement(subject, [values for _, values in answers], mine, sequences, None)
    finally:
        service.close()
        service.load()
    try:
        attest_bytes(update, received)
    except AttestationError as error:
        return replace(found, ok=False, where=str(error))
    kept = {name: value for name, value in found.detail.items() if name != "by_position"}
    return replace(found, detail={**kept, "checksum": update.checksum, "sent": len(update.names)})
