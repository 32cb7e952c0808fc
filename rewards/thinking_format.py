"""Does a completion think once, and then answer?"""

from __future__ import annotations

from rollout.template import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN, Reasoning, answer_in_tags
from rollout.types import Completion


def thinking_format(
    completion: Completion, reasoning: Reasoning, forced_think: bool, *, answer_tags: bool = True
) -> float:
    """1.0 for exactly one closed thinking and then a non-empty answer, else 0.0.

    Where the prompt opens the thinking the completion must not open another; elsewhere it must start with ``<think>``.

    Args:
        answer_tags: the answer must be exactly one ``<answer>…</answer>`` with nothing around it; False takes any text.
    """
    text = completion.text
    opened = text.count(THINK_OPEN)
    starts_well = opened == 0 if forced_think else opened == 1 and text.lstrip().startswith(THINK_OPEN)
    if not starts_well or text.count(THINK_CLOSE) != 1:
        return 0.0
    answer = reasoning.answer
    if not answer_tags:
        return 1.0 if answer else 0.0
    framed = answer.startswith(ANSWER_OPEN) and answer.endswith(ANSWER_CLOSE)
    once = answer.count(ANSWER_OPEN) == answer.count(ANSWER_CLOSE) == 1
    return 1.0 if framed and once and answer_in_tags(answer) else 0.0
