"""The judge against a real `vllm serve` on the CPU: a tiny random model, held to the form of a verdict."""

from __future__ import annotations

import re

import pytest

from rewards import model_judge
from rewards.model_judge import JudgeError, judge
from rollout.template import split_reasoning
from rollout.types import Problem


async def test_a_real_endpoint(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model_judge._client.cache_clear()  # clients live as long as their event loop
    model_judge._pace.cache_clear()
    problem, reasoning = Problem(id="p", prompt="2*3?", answer="6"), split_reasoning("t</think>six")

    async def ask(**request):
        return await judge(
            problem, reasoning, endpoint=endpoint, model="tiny", rubric="Is it {answer}?", request=request
        )

    with pytest.raises(JudgeError):  # random words are no verdict
        await ask(max_tokens=8)
    with pytest.raises(JudgeError, match="answered 400"):
        await ask(max_tokens=100_000)

    marker = "0123456789abcdef" * 2
    monkeypatch.setattr(model_judge.secrets, "token_hex", lambda _: marker)
    form = re.escape(f'{{"id": "{marker}", "score": 7}}')
    score = await ask(max_tokens=128, extra_body={"structured_outputs": {"regex": form}})
    assert score.value == 0.7
    assert score.metrics["prompt_tokens"] > 50 and score.metrics["completion_tokens"] > 10
