"""An OpenAI-compatible endpoint on this machine that answers well, badly or not at all, as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rollout.endpoint_protocol import EndpointConfig, EndpointJob
from rollout.types import Problem, SamplingParams


@dataclass
class Answer:
    """One reply.

    Attributes:
        status, body, headers: what is sent.
        wait_s: time before it, seconds; ends early when the server ends or is made to forget.
        drop: hang up instead.
        cut: hang up after this many bytes of the body.
        drip_s: time between the bytes of the body, seconds.
        raw: bytes that are sent instead of a reply in HTTP.
    """

    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_s: float = 0.0
    drop: bool = False
    cut: int | None = None
    drip_s: float = 0.0
    raw: bytes = b""


def whole(text: str | None, finish: str | None = "stop", **message: Any) -> Answer:
    """A completion that fits both kinds: ``text`` and a ``message``."""
    choice = {"index": 0, "text": text, "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
    return Answer(body=json.dumps({"choices": [{**choice, "finish_reason": finish}], "usage": usage}))


def echo(request: Mapping[str, Any], _: int) -> Answer:
    """The seed of the request, as the completion."""
    return whole(f"seed {request['seed']}")


class FakeEndpoint:
    """Answers by ``answer(request, attempt)``; the attempt is counted from 1 for each seed.

    Attributes:
        requests: bodies of the requests for completions; keys: their ``Authorization`` headers.
        models: what ``/models`` lists, ``{name: owner}``; None answers 404 there. listed: how often it was asked;
            listing: what it answers before.
        most_at_once: most requests in flight.
    """

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any], int], Answer] = echo
        self.models: dict[str, str] | None = None
        self.listing: list[Answer] = []
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.attempts: Counter[int] = Counter()
        self.at_once = self.most_at_once = self.listed = 0
        self.release = threading.Event()
        self.dead = False
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.request_queue_size = 64
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hung up
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.005,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def forget(self) -> None:
        """As new, at the same address; whoever waits is answered now."""
        self.release.set()
        self.release = threading.Event()
        self.answer, self.models, self.listing, self.listed = echo, None, [], 0
        self.requests, self.paths, self.keys, self.attempts = [], [], [], Counter()
        self.at_once = self.most_at_once = 0

    def die(self) -> None:
        """Nobody listens any more."""
        self.dead = True
        self.release.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@contextmanager
def fake_endpoint() -> Iterator[FakeEndpoint]:
    """One that ends with the block."""
    found = FakeEndpoint()
    try:
        yield found
    finally:
        if not found.dead:
            found.die()


def config(server: FakeEndpoint | str, **options: Any) -> EndpointConfig:
    """A configuration for a fake endpoint, or for an address."""
    url = server if isinstance(server, str) else server.url
    return EndpointConfig(**{"url": url, "model": "m", "timeout_s": 20.0, **options})


def job(seed: int, **params: Any) -> EndpointJob:
    """A job that both kinds can send; the seed says which."""
    problem = Problem(id=f"p{seed}", prompt=f"question {seed}")
    messages = ({"role": "user", "content": problem.prompt},)
    return EndpointJob(
        problem=problem,
        text=problem.prompt,
        messages=messages,
        sample_index=seed % 3,
        seed=seed,
        params=SamplingParams(**{"max_tokens": 8, **params}),
    )


def _handler(endpoint: FakeEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with endpoint.lock:
                endpoint.listed += 1
                answer = endpoint.listing.pop(0) if endpoint.listing else None
            if answer is not None:
                endpoint.release.wait(answer.wait_s)
                self._send(answer)
            elif endpoint.models is None:
                self._send(Answer(status=404, body="{}"))
            else:
                rows = [{"id": name, "object": "model", "owned_by": owner} for name, owner in endpoint.models.items()]
                self._send(Answer(body=json.dumps({"object": "list", "data": rows})))

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                endpoint.requests.append(request)
                endpoint.paths.append(self.path)
                endpoint.keys.append(self.headers["Authorization"])
                endpoint.attempts[request["seed"]] += 1
                attempt = endpoint.attempts[request["seed"]]
                endpoint.at_once += 1
                endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
            try:
                answer = endpoint.answer(request, attempt)
                endpoint.release.wait(answer.wait_s)
            finally:
                with endpoint.lock:
                    endpoint.at_once -= 1
            self._send(answer)

        def _send(self, answer: Answer) -> None:
            if answer.drop or answer.raw:
                self.wfile.write(answer.raw)
                return
            body = answer.body.encode()
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if answer.drip_s:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(answer.drip_s)
            else:
                self.wfile.write(body[: answer.cut])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
