"""From a problem to prompt tokens, and from a completion back to its thinking and its answer.

Standard library only. Three templates: ``chat`` (the tokenizer's own chat template with the generation prompt; R1's
ends in ``<think>``, so that the policy has to think), ``r1-zero`` (the plain-text template of DeepSeek-R1-Zero) and
``raw`` (the prompt as it is).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rollout.types import Problem

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TEMPLATES = ("chat", "r1-zero", "raw")

# The wording is the published one (arXiv 2501.12948, table 1): a checkpoint trained with it expects exactly this.
R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
)


class ChatTokenizer(Protocol):
    """The part of a tokenizer that rendering needs (every Hugging Face tokenizer has it)."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def encode(self, text: str, **options: Any) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A completion taken apart.

    Attributes:
        thinking: what stands between ``<think>`` and ``</think>``; None when there was no thinking at all.
        answer: everything after the thinking, white space at both ends removed; empty while the thinking is open.
        closed: False when a thinking was begun and never ended.
    """

    thinking: str | None
    answer: str
    closed: bool


def split_reasoning(text: str, *, forced_think: bool = True) -> Reasoning:
    """Splits a completion at the end of its thinking: the first ``</think>``.

    Args:
        text: the completion, special tokens kept, without the prompt.
        forced_think: the prompt itself ended in ``<think>``, so the completion starts inside the thinking. A policy
            that writes ``<think>`` once more at the start is read as if it had not.

    Example:
        >>> split_reasoning("3+5=8</think><answer>8</answer>")
        Reasoning(thinking='3+5=8', answer='<answer>8</answer>', closed=True)
    """
    start, end = text.find(THINK_OPEN), text.find(THINK_CLOSE)
    opened = start >= 0 and (end < 0 or start < end)
    if not opened and end < 0 and not forced_think:
        return Reasoning(None, text.strip(), True)
    repeated = opened and not text[:start].strip()  # what stands before a tag of its own belongs to a forced thinking
    begin = start + len(THINK_OPEN) if opened and (repeated or not forced_think) else 0
    if end < 0:
        return Reasoning(text[begin:], "", False)
    return Reasoning(text[begin:end], text[end + len(THINK_CLOSE) :].strip(), True)


def answer_in_tags(text: str) -> str | None:
    """Content of the last ``<answer>…</answer>`` of a text, stripped; None when there is no complete pair."""
    end = text.rfind(ANSWER_CLOSE)
    start = text.rfind(ANSWER_OPEN, 0, end) if end >= 0 else -1
    return text[start + len(ANSWER_OPEN) : end].strip() if start >= 0 else None


def extract_answer(text: str, *, forced_think: bool = True) -> str | None:
    """The final answer of a completion: the last ``<answer>…</answer>`` after the thinking, else all text after it.

    Tags inside the thinking never count. None when the thinking never closed.
    """
    reasoning = split_reasoning(text, forced_think=forced_think)
    if not reasoning.closed:
        return None
    tagged = answer_in_tags(reasoning.answer)
    return reasoning.answer if tagged is None else tagged


def check_template(template: str) -> None:
    """Refuses a template that there is none of.

    Raises:
        ValueError: names those that there are.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")


def prompt_text(problem: Problem, tokenizer: ChatTokenizer, template: str) -> str:
    """The prompt as the policy reads it, before tokenisation.

    Raises:
        ValueError: an unknown template, or a tokenizer without a chat template.
    """
    check_template(template)
    if template == "raw":
        return problem.prompt
    if template == "r1-zero":
        return R1_ZERO_TEMPLATE.format(prompt=problem.prompt)
    if not getattr(tokenizer, "chat_template", True):
        raise ValueError("the tokenizer has no chat template: use template raw or r1-zero, or another tokenizer")
    messages = [{"role": "user", "content": problem.prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def forces_thinking(prompt: str) -> bool:
    """True when a rendered prompt ends in ``<think>``: its completions start inside the thinking."""
    return prompt.rstrip().endswith(THINK_OPEN)


def render_prompt(problem: Problem, tokenizer: ChatTokenizer, template: str = "chat") -> list[int]:
    """Token ids of the prompt. [T_prompt]

    A chat template writes its own special tokens; for ``r1-zero`` and ``raw`` the tokenizer adds its usual ones.

    Raises:
        ValueError: an unknown template, a tokenizer without a chat template, or a prompt without a single token.
    """
    text = prompt_text(problem, tokenizer, template)
    token_ids = list(tokenizer.encode(text, add_special_tokens=template != "chat"))
    if not token_ids:
        raise ValueError(f"problem {problem.id!r} renders to an empty prompt with template {template}")
    return token_ids
