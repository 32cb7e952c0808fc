"""Completions drawn from a real `vllm serve` on the CPU, straight and through faults."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from evals.samples import read_samples
from pipelines.cli import main
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


OWN = """
task: sums
data_file: sums.jsonl
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metadata: {version: 1}
"""


def test_a_whole_evaluation_through_faults(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """``r1 eval --endpoint``: with a server that fails now and then, and once for good, every sample is the same."""
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE_S", 0.01)
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({"question": f"{n}+{n}=", "answer": str(2 * n)}) + "\n" for n in range(4))
    )
    (tmp_path / "sums.yaml").write_text(OWN)

    def evaluate(url: str, out: str) -> int:
        return main([
            "eval", "--endpoint", url, "--model", "tiny", "--benchmarks", str(tmp_path / "sums.yaml"),
            "--data-dir", str(tmp_path), "--samples", "2", "--max-tokens", "12", "--concurrency", "1", "--retries", "1",
            "--timeout", "20", "--out", str(tmp_path / out), "--json",
        ])  # fmt: skip

    served, dies_at = 0, 4
    with fake_endpoint() as between:
        between.models = {"tiny": "vllm"}

        def answer(request: dict[str, Any], attempt: int) -> Answer:
            nonlocal served
            if served >= dies_at:
                return Answer(status=500, body="{}")
            if attempt == 1 and served % 2 == 0:
                return Answer(status=429, headers={"Retry-After-Ms": "20"}) if served else Answer(drop=True)
            served += 1
            status, body = post(endpoint, request)
            return Answer(status=status, body=body)

        between.answer = answer
        assert evaluate(between.url, "faults") == 1
        told = capfd.readouterr()
        line = [line for line in told.err.splitlines() if line.startswith("r1: ")]
        assert len(line) == 1 and "answered 500" in line[0] and "given up after 2 attempts" in line[0], told.err
        dies_at = 99
        assert evaluate(between.url, "faults") == 0
        found = json.loads(capfd.readouterr().out)
    assert evaluate(endpoint, "straight") == 0
    samples = {
        out: sorted(read_samples(tmp_path / out / "sums"), key=lambda sample: sample.key)
        for out in ("faults", "straight")
    }
    assert samples["faults"] == samples["straight"] and len(samples["faults"]) == 8 == served
    assert (found["results"]["sums"]["samples"], found["results"]["sums"]["missing"]) == (8, 0)
    assert found["sampler"]["faults"]["429"] >= 1
