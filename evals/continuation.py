r"""What a base model wrote -> what the graders read.

Graders look for a box, ``<answer>`` tags or a fenced block, and a base model that continues examples writes none of
these: it ends in ``#### 18``, "The answer is 18.", or in the body of a function. Pure; nothing is judged here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from evals.benchmark import Benchmark
from evals.protocol import Protocol
from evals.templates import render
from rewards.answers import boxed
from rollout.template import answer_in_tags
from rollout.types import Problem


def as_answer(benchmark: Benchmark, protocol: Protocol, problem: Problem, text: str) -> str:
    """A completion in the form that the benchmark's grader reads.

    Only ``raw`` completions change: they are cut at the first stop string (an engine has done so; what others drew may
    go on), and

    - where programs are graded, the program becomes a fenced block: ``base_answer`` over the row's columns and
      ``completion`` (HumanEval: prompt + completion), else the completion itself.
    - elsewhere, what follows the last match of ``answer_prefix`` on its line is repeated at the end, in a box for
      ``accuracy``, in ``<answer>`` tags for all other graders. A completion with a box or such tags keeps these.

    Args:
        problem: as :func:`evals.benchmark_data.load_benchmark` made it (its metadata are the row's columns).
        text: the completion, without the prompt.

    Raises:
        ValueError: ``base_answer`` names a column that the row does not have.

    Example:
        >>> as_answer(gsm8k, PROTOCOLS["few-shot"], problem, "He has 3 + 4 = 7.\\n#### 7\\n\\nQuestion: And …")
        'He has 3 + 4 = 7.\\n#### 7\\n\\\\boxed{7}'
    """
    if protocol.template != "raw":
        return text
    text = cut_at(text, protocol.sampling_for(benchmark).stop)
    if benchmark.grader.path == "code_tests":
        return _as_block(benchmark, problem, text)
    if not benchmark.answer_prefix or boxed(text) or answer_in_tags(text) is not None:
        return text
    answer = after_prefix(text, benchmark.answer_prefix)
    if answer is None or benchmark.grader.path == "choice":  # that one reads sentences itself
        return text
    form = "\\boxed{{{}}}" if benchmark.grader.path == "accuracy" else "<answer>{}</answer>"
    return f"{text.rstrip()}\n{form.format(answer)}"


def cut_at(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stop strings."""
    return text[: min((at for each in stop if (at := text.find(each)) >= 0), default=len(text))]


def after_prefix(text: str, prefix: str) -> str | None:
    """What follows the last match of a regular expression on its line, stripped of its full stop and its dollars.

    The first group that took part is the answer, where the expression has groups. None without a match or a text.
    """
    matches = list(re.finditer(prefix, text, re.IGNORECASE | re.MULTILINE))
    if not matches:
        return None
    groups = [group for group in matches[-1].groups() if group is not None]
    answer = groups[0] if groups else text[matches[-1].end() :].strip(" \t").partition("\n")[0]
    answer = answer.strip().rstrip(".").strip()
    if len(answer) > 1 and answer[0] == answer[-1] == "$" and "$" not in answer[1:-1]:
        answer = answer[1:-1].strip()
    return answer or None


def _as_block(benchmark: Benchmark, problem: Problem, text: str) -> str:
    program = text
    if benchmark.base_answer:
        columns = {**problem.metadata, "completion": text}
        program = str(render(benchmark.base_answer, columns, place=f"{benchmark.name}, {problem.id}: base_answer"))
    ticks = max((len(run) for run in re.findall(r"`{3,}", program)), default=2) + 1
    return f"{'`' * ticks}python\n{program.rstrip()}\n{'`' * ticks}\n"
