"""Completions drawn from a real `vllm serve` on the CPU, straight and through faults."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest

from rollout import endpoint as endpoint_module
from rollout.endpoint import Drawn, Endpoint, EndpointConfig, EndpointError, EndpointJob
from rollout.types import Problem, SamplingParams
from tests.unit.fake_endpoint import Answer, fake_endpoint


def job(seed: int, prompt: str = "3+5=", **params: Any) -> EndpointJob:
    return EndpointJob(
        problem=Problem(id="p", prompt=prompt),
        text=f"{prompt}\n",  # what the server's template makes of the messages
        messages=({"role": "user", "content": prompt},),
        sample_index=seed,
        seed=seed,
        params=SamplingParams(**{"max_tokens": 16, **params}),
    )


def draw(url: str, jobs: list[EndpointJob], **options: Any) -> dict[int, Drawn]:
    with Endpoint(EndpointConfig(**{"url": url, "model": "tiny", "concurrency": 4, **options})) as endpoint:
        return {found.seed: drawn for found, drawn in endpoint.draw(jobs)}


def post(url: str, body: dict[str, Any]) -> tuple[int, str]:
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as reply:
        return reply.status, reply.read().decode()


def test_both_kinds_say_the_same(endpoint: str):
    chat = draw(endpoint, [job(1, temperature=0.0)], kind="chat")[1]
    plain = draw(endpoint, [job(1, temperature=0.0)], kind="completions")[1]
    assert chat.text == plain.text != ""
    assert (chat.tokens, chat.prompt_tokens) == (plain.tokens, plain.prompt_tokens) == (16, 5)
    assert (chat.finish_reason, chat.attempts) == ("length", 1)

    cut = chat.text[4:6]
    stopped = draw(endpoint, [job(1, temperature=0.0, stop=(cut,))])[1]
    assert (stopped.text, stopped.finish_reason) == (chat.text.partition(cut)[0], "stop")


def test_seeds_and_sampling_are_those_that_were_asked_for(endpoint: str):
    first, again = (draw(endpoint, [job(seed) for seed in range(4)]) for _ in range(2))
    assert {seed: drawn.text for seed, drawn in first.items()} == {seed: drawn.text for seed, drawn in again.items()}
    assert len({drawn.text for drawn in first.values()}) == 4
    greedy = draw(endpoint, [job(9, temperature=0.0), job(8, top_k=1)])
    assert greedy[8].text == greedy[9].text

    # The model's folder asks for a top-k of 1. Who does not say otherwise gets it: all seeds alike.
    body = {"model": "tiny", "messages": [{"role": "user", "content": "3+5="}], "max_tokens": 16, "temperature": 1.0}
    silent = {
        json.loads(post(endpoint, {**body, "seed": seed})[1])["choices"][0]["message"]["content"] for seed in (0, 1)
    }
    assert len(silent) == 1


def test_special_tokens_are_kept_and_the_end_is_not(endpoint: str):
    drawn = draw(endpoint, [job(seed, max_tokens=300) for seed in range(4, 12)])
    texts = [found.text for found in drawn.values()]
    assert any("<|User|>" in text or "<|Assistant|>" in text for text in texts)
    assert not any("<|eos|>" in text for text in texts)
    assert {found.finish_reason for found in drawn.values()} == {"stop", "length"}
    assert all(found.tokens is not None and 0 < found.tokens <= 300 for found in drawn.values())


def test_what_the_server_refuses(endpoint: str):
    with pytest.raises(EndpointError, match="has no model 'tinny'; it has tiny"):
        draw(endpoint, [job(0)], model="tinny")
    with pytest.raises(EndpointError, match=r"answered 400: .*2048.* \(problem 'p', sample 0\)"):
        draw(endpoint, [job(0, max_tokens=100_000)])
    with pytest.raises(EndpointError, match="mostly ends in /v1"):
        draw(endpoint.removesuffix("/v1"), [job(0)])


def test_faults_change_nothing(endpoint: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE_S", 0.01)
    jobs = [job(seed) for seed in range(8)]
    straight = draw(endpoint, jobs, concurrency=1)
    faults = [
        Answer(status=429, headers={"Retry-After-Ms": "20"}),
        Answer(status=500, body="{}"),
        Answer(drop=True),
        Answer(body='{"choices": [{"mess', headers={"Content-Length": "999"}),
        Answer(wait_s=9),
    ]

    with fake_endpoint() as between:
        between.models = {"tiny": "vllm"}

        def answer(request: dict[str, Any], attempt: int) -> Answer:
            number = request["seed"] + attempt - 1
            if attempt <= 2 and number < len(faults):
                return faults[number]
            status, body = post(endpoint, request)
            return Answer(status=status, body=body)

        between.answer = answer
        through = draw(between.url, jobs, concurrency=1, timeout_s=3.0)
        between.release.set()
    assert {seed: found.text for seed, found in through.items()} == {
        seed: found.text for seed, found in straight.items()
    }
    assert [through[seed].attempts for seed in range(8)] == [3, 3, 3, 3, 2, 1, 1, 1]
