r"""How a benchmark is asked: sampling, samples per problem, template, few-shot examples.

``deepseek``
    As DeepSeek-R1's report describes it (arXiv 2501.12948, section 3): temperature 0.6, top-p 0.95, 32,768 tokens at
    most, k samples per problem, no system prompt, the instruction in the user's text, the thinking opened for it.
``greedy``
    The same prompt, one completion at temperature 0.
``few-shot``
    For base models: examples and question as plain text, greedy, ended by the benchmark's stop strings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from evals.nearest import nearest
from rollout.template import check_template
from rollout.types import SamplingParams

if TYPE_CHECKING:
    from evals.benchmark import Benchmark

_LONG = 32_768  # tokens, DeepSeek's limit
_SHORT = 2_048  # tokens; a base model that finds no stop string would go on to the end


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How completions are drawn.

    Attributes:
        name: deepseek | few-shot | greedy.
        sampling: temperature, top_p, top_k, max_tokens, stop. An empty ``stop`` takes the benchmark's for ``raw``.
        samples: completions per problem (k); 0 takes the benchmark's ``repeats``.
        template: how a prompt is rendered: chat | raw | r1-zero (rollout.template).
        force_think: a rendered chat prompt that does not end in ``<think>`` gets one; only with ``chat``.
        num_fewshot: examples before the question; -1 takes the benchmark's for ``raw`` and none elsewhere.
    """

    name: str
    sampling: SamplingParams = field(default_factory=SamplingParams)
    samples: int = 0
    template: str = "chat"
    force_think: bool = True
    num_fewshot: int = -1

    def __post_init__(self) -> None:
        check_template(self.template)
        if self.samples < 0:
            raise ValueError(f"samples must be >= 0 (0 takes the benchmark's own), got {self.samples}")
        if self.num_fewshot < -1:
            raise ValueError(f"num_fewshot must be >= 0 (-1 takes the benchmark's own), got {self.num_fewshot}")
        if self.force_think and self.template != "chat":
            raise ValueError(f"force_think is for the chat template; with {self.template} set it to false")
        if self.sampling.temperature == 0 and self.samples != 1:
            raise ValueError(
                f"temperature 0 draws the same completion each time: samples must be 1, got {self.samples}; or raise "
                "the temperature"
            )

    def samples_for(self, benchmark: Benchmark) -> int:
        """Completions per problem of a benchmark, >= 1."""
        return self.samples or benchmark.repeats

    def sampling_for(self, benchmark: Benchmark) -> SamplingParams:
        """Sampling with the stop strings that hold for a benchmark."""
        if self.sampling.stop or self.template != "raw":
            return self.sampling
        return replace(self.sampling, stop=benchmark.until)

    def shots_for(self, benchmark: Benchmark) -> int:
        """Examples before each question of a benchmark.

        Raises:
            ValueError: the benchmark has fewer examples.
        """
        asked = self.num_fewshot if self.num_fewshot >= 0 else benchmark.num_fewshot if self.template == "raw" else 0
        if asked > len(benchmark.fewshot):
            raise ValueError(
                f"{benchmark.name}: {asked} few-shot examples are asked for and it has {len(benchmark.fewshot)}: lower "
                "num_fewshot, or write more under fewshot_config.samples"
            )
        return asked

    def to_json(self) -> dict[str, Any]:
        """Plain values, everything spelled out."""
        row = asdict(self)
        row["sampling"]["stop"] = list(self.sampling.stop)
        return row


PROTOCOLS: Mapping[str, Protocol] = {
    "deepseek": Protocol(name="deepseek", sampling=SamplingParams(temperature=0.6, top_p=0.95, max_tokens=_LONG)),
    "few-shot": Protocol(
        name="few-shot",
        sampling=SamplingParams(temperature=0.0, max_tokens=_SHORT),
        samples=1,
        template="raw",
        force_think=False,
    ),
    "greedy": Protocol(name="greedy", sampling=SamplingParams(temperature=0.0, max_tokens=_LONG), samples=1),
}


def protocol_of(name: str, **changes: Any) -> Protocol:
    """A protocol by its name, with changes.

    Args:
        name: deepseek | few-shot | greedy.
        changes: fields of Protocol or of its sampling (``temperature``, ``max_tokens``, …); None keeps the protocol's.

    Raises:
        ValueError: an unknown protocol or field (the nearest is named), or a value out of its range.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"there is no protocol {name!r}{nearest(name, PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    given = {key: value for key, value in changes.items() if value is not None}
    sampling_fields = {each.name for each in fields(SamplingParams)}
    own_fields = {each.name for each in fields(Protocol)} - {"name", "sampling"}
    for key in given:
        if key not in sampling_fields | own_fields:
            raise ValueError(f"a protocol has no {key!r}{nearest(key, [*own_fields, *sampling_fields])}")
    if given.get("samples") == 0:
        raise ValueError("samples must be >= 1, got 0; leave it out to take the benchmark's own")
    if "stop" in given:
        given["stop"] = (given["stop"],) if isinstance(given["stop"], str) else tuple(given["stop"])
    if given.get("template", "chat") != "chat":  # the tag that opens a thinking belongs to a chat
        given.setdefault("force_think", False)
    sampling = replace(protocol.sampling, **{key: given[key] for key in given if key in sampling_fields})
    if sampling.temperature == 0:
        given.setdefault("samples", 1)
    return replace(protocol, sampling=sampling, **{key: given[key] for key in given if key in own_fields})
