"""Completions from an OpenAI-compatible endpoint that answers well, badly or not at all."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout import endpoint as endpoint_module
from rollout import endpoint_http
from rollout.endpoint import Endpoint, EndpointError, EndpointJob, Pace
from rollout.endpoint_http import Acquaintance, Client
from rollout.endpoint_protocol import Fault
from tests.unit.fake_endpoint import Answer, FakeEndpoint, config, echo, fake_endpoint, job, whole

KEY = "sk-very-secret-0123456789"
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("error")  # of tasks and sessions that nobody ended


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeEndpoint]:
    with fake_endpoint() as found:
        yield found


@pytest.fixture
def server(shared: FakeEndpoint) -> Iterator[FakeEndpoint]:
    shared.forget()
    yield shared
    shared.forget()  # answers whoever waits, so that nothing is left of the server's


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(endpoint_module, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(endpoint_http, "LISTING_PAUSE_S", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread and no socket more than before; those of the server itself end a little later."""
    threads, sockets = set(threading.enumerate()), open_sockets()
    yield
    end = time.monotonic() + 2
    while (set(threading.enumerate()) - threads or open_sockets() > sockets) and time.monotonic() < end:
        time.sleep(0.005)
    left = [thread.name for thread in set(threading.enumerate()) - threads]
    assert (left, max(0, open_sockets() - sockets)) == ([], 0)


def open_sockets() -> int:
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # the one that lists
            continue
    return sum(link.startswith(("socket:", "anon_inode:[eventpoll]")) for link in links)


def draw(server: FakeEndpoint | str, count: int = 1, **options: Any) -> dict[int, Any]:
    """What is drawn for the seeds 0 to count - 1; every one must come once."""
    with Endpoint(config(server, **options)) as endpoint:
        pairs = list(endpoint.draw(job(seed) for seed in range(count)))
    assert sorted(found.seed for found, _ in pairs) == list(range(count))
    return {found.seed: drawn for found, drawn in pairs}


def failure(server: FakeEndpoint | str, count: int = 1, **options: Any) -> str:
    """The one line of the error, which must not tell the key."""
    with pytest.raises(EndpointError) as caught:
        draw(server, count, **options)
    assert isinstance(caught.value, ValueError)
    assert caught.value.__cause__ is None and caught.value.__context__ is None  # they would carry the request along
    told = str(caught.value)
    assert "\n" not in told and KEY not in str(caught.getrepr(style="long", showlocals=True))
    return told


# --- what is sent


def test_a_chat(server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    asked = job(7, temperature=0.6, top_p=0.95, top_k=20, max_tokens=64, stop=("\n\n", "Q:"))
    with Endpoint(config(server, api_key_env="MY_KEY")) as endpoint:
        ((found, drawn),) = endpoint.draw([asked])
        assert KEY not in repr(vars(endpoint.config)) + repr(endpoint) + str(endpoint.config)
    assert found is asked
    assert (drawn.text, drawn.finish_reason, drawn.tokens, drawn.prompt_tokens) == ("seed 7", "stop", 3, 12)
    assert (drawn.seed, drawn.attempts) == (7, 1) and drawn.seconds > 0
    assert server.requests == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "question 7"}],
            "max_tokens": 64,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 20,
            "stop": ["\n\n", "Q:"],
            "seed": 7,
        }
    ]
    assert (server.paths, server.keys) == (["/v1/chat/completions"], [f"Bearer {KEY}"])


def test_a_completion_without_a_key(server: FakeEndpoint):
    assert draw(server.url + "/", kind="completions")[0].text == "seed 0"
    expected = {"model": "m", "prompt": "question 0", "max_tokens": 8, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    assert server.requests == [expected]
    assert (server.paths, server.keys) == (["/v1/completions"], [None])


def test_the_models_are_asked_for_once_and_vllm_is_told_its_own(server: FakeEndpoint):
    server.models = {"m": "vllm"}
    draw(server, 5)
    assert server.listed == 1
    assert {request["top_k"] for request in server.requests} == {-1}


def test_the_list_of_models_is_asked_again_after_a_passing_fault(server: FakeEndpoint):
    server.models = {"m": "vllm"}
    server.listing = [Answer(status=503), Answer(drop=True)]
    draw(server)
    assert server.listed == 3 and server.requests[0]["top_k"] == -1
    server.listing, server.listed = [Answer(wait_s=20)] * 9, 0
    draw(server, timeout_s=0.2)
    assert server.listed == 3 and "top_k" not in server.requests[1]


@pytest.mark.parametrize("key", ["two words", "schlüssel-9", "a\nb", "a\x07b"])
def test_what_is_no_key(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(EndpointError, match="MY_KEY holds no key") as caught:
        Endpoint(config("http://h/v1", api_key_env="MY_KEY"))
    assert key not in str(caught.value)


# --- faults that pass


def passing(*answers: Answer):
    """These first, for every job; then an echo."""
    return lambda request, attempt: answers[attempt - 1] if attempt <= len(answers) else echo(request, attempt)


SOON = {"Retry-After-Ms": "5"}
PASSING = {
    "429": Answer(status=429, headers=SOON),
    "500": Answer(status=500, body="{}"),
    "502": Answer(status=502, body="<html>bad gateway</html>"),
    "503": Answer(status=503, body='{"detail": "loading"}', headers=SOON),
    "drop": Answer(drop=True),
    "cut": Answer(body='{"choices": [{"text": "aaaaaaaa"', cut=20),
    "not http": Answer(raw=b"\x00\x01garbage\r\n\r\n"),
    "no json": Answer(body="{broken"),
    "no choices": Answer(body='{"choices": []}'),
    "aborted": whole("half", "abort"),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_tried_again(server: FakeEndpoint, name: str):
    server.answer = passing(PASSING[name], PASSING[name])
    drawn = draw(server, 3, retries=2)
    assert [drawn[seed].text for seed in range(3)] == ["seed 0", "seed 1", "seed 2"]
    assert {found.attempts for found in drawn.values()} == {3}
    assert len(server.requests) == 9


def test_a_stalled_answer_is_tried_again(server: FakeEndpoint):
    server.answer = passing(Answer(wait_s=20))
    with Endpoint(config(server, timeout_s=0.3)) as endpoint:
        assert [drawn.text for _, drawn in endpoint.draw([job(0)])] == ["seed 0"]
        assert set(endpoint.faults) == {"timeout"}


@settings(max_examples=30)
@given(
    faults=st.lists(st.lists(st.sampled_from(sorted(PASSING)), max_size=3), max_size=9),
    concurrency=st.integers(1, 6),
    kind=st.sampled_from(["chat", "completions"]),
)
def test_every_job_is_yielded_once_whatever_the_order_of_faults(shared, faults, concurrency, kind):
    shared.forget()
    shared.answer = lambda request, attempt: (
        PASSING[plan[attempt - 1]] if len(plan := faults[request["seed"]]) >= attempt else echo(request, attempt)
    )
    drawn = draw(shared, len(faults), concurrency=concurrency, kind=kind, retries=3)
    assert {seed: found.text for seed, found in drawn.items()} == {seed: f"seed {seed}" for seed in range(len(faults))}
    assert [drawn[seed].attempts for seed in range(len(faults))] == [len(plan) + 1 for plan in faults]


@pytest.mark.parametrize(("status", "others_wait"), [(429, True), (503, False)])
def test_the_endpoint_says_when_to_come_back(server: FakeEndpoint, status: int, others_wait: bool):
    starts: list[tuple[float, int]] = []

    def answer(request: dict[str, Any], attempt: int) -> Answer:
        starts.append((time.monotonic(), request["seed"]))
        if (request["seed"], attempt) == (0, 1):
            return Answer(status=status, headers={"Retry-After": "0.4"})
        return replace(echo(request, attempt), wait_s=0.1 if request["seed"] == 1 else 0.0)

    server.answer = answer
    draw(server, 4, concurrency=2)
    began = starts[0][0]
    assert max(start for start, seed in starts if seed == 0) - began >= 0.4
    assert (min(start for start, seed in starts if seed > 1) - began >= 0.4) == others_wait


def test_a_rate_limit_uses_up_nobodys_patience_while_others_get_through(server: FakeEndpoint):
    tokens = iter(range(1000))  # every third request gets through: some job is refused far more often than retries

    def answer(request: dict[str, Any], attempt: int) -> Answer:
        refused = (request["seed"] == 0 and attempt < 9) or next(tokens) % 3
        return Answer(status=429) if refused else whole("ok")

    server.answer = answer
    drawn = draw(server, 30, concurrency=2, retries=6)
    assert drawn[0].attempts >= 9


def test_pauses_grow_and_are_the_same_in_every_run(server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(endpoint_module, "LONGEST_PAUSE_S", 60.0)
    fault, so_far = Fault("500", "answered 500"), [endpoint_module._Attempts() for _ in range(2)]
    client = Client(config(server, retries=9), "", Acquaintance())
    drawing = endpoint_module._Drawing(client.config, client, Pace(0), Counter())
    first, second = ([drawing._pause(fault, attempts, job(3)) for _ in range(9)] for attempts in so_far)
    assert first == second
    assert all(0.5 * 2**n <= pause <= 2**n for n, pause in enumerate(first[:6]))
    assert all(30 <= pause <= 60 for pause in first[6:])
    with pytest.raises(EndpointError, match=r"answered 500; given up after .* 'p3', sample 0"):
        drawing._pause(fault, so_far[0], job(3))


# --- faults that do not


@pytest.mark.parametrize("name", PASSING)
def test_what_does_not_pass_is_told_after_the_retries(server: FakeEndpoint, name: str):
    server.answer = lambda *_: PASSING[name]
    told = failure(server, retries=2)
    assert len(server.requests) == 3
    assert server.url in told and "given up after 3 attempts (problem 'p0', sample 0)" in told


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(wait_s=20), "gave no whole answer in 0.2 s"),
        (Answer(body="x" * 400, drip_s=0.01), "gave no whole answer in 0.2 s"),
    ],
)
def test_nothing_hangs(server: FakeEndpoint, answer: Answer, told: str):
    server.answer = lambda *_: answer
    start = time.monotonic()
    assert told in failure(server, retries=1, timeout_s=0.2)
    assert time.monotonic() - start < 5


def test_an_answer_without_an_end_is_not_kept(server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint_http, "MAX_REPLY_BYTES", 1 << 20)
    server.answer = lambda *_: Answer(body="x" * (3 << 20))
    assert "answered more than 1 MiB" in failure(server, retries=0)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(status=400, body='{"error": {"message": "prompt is too long"}}'), "answered 400: prompt is too long ("),
        (Answer(status=422, body='{"detail": "no top_k"}'), "answered 422: no top_k ("),
        (Answer(status=404), "answered 404; url must be the base address of the API, which mostly ends in /v1"),
        (Answer(status=403, body='{"message": "not from here"}'), "answered 403: not from here"),
        (Answer(status=301, headers={"Location": "https://new/v1"}), "a redirection to 'https://new/v1'"),
        (Answer(status=429, body='{"error": {"code": "insufficient_quota", "message": "pay"}}'), "answered 429: pay"),
        (
            Answer(status=429, headers={"Retry-After": "3600"}),
            "asks to come back in 3600 s, which is more than timeout_s",
        ),
        (Answer(body="<html>hello</html>"), "mostly ends in /v1"),
    ],
)
def test_what_retries_cannot_mend_is_told_at_once(server: FakeEndpoint, answer: Answer, told: str):
    server.answer = lambda *_: answer
    assert told in failure(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 500])
def test_the_key_is_never_told(server: FakeEndpoint, status: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.answer = lambda *_: Answer(status=status, body=json.dumps({"error": {"message": server.keys[-1]}}))
    told = failure(server, retries=0)
    assert server.keys == [f"Bearer {KEY}"] and str(status) in told
    server.answer = lambda *_: Answer(body=f"you said {server.keys[-1]}")
    assert "(the key)" in failure(server, retries=0)


def test_a_key_that_is_refused_or_missing(server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch):
    server.answer = lambda *_: Answer(status=401)
    assert "answered 401: it wants a key; set OPENAI_API_KEY (" in failure(server)
    assert "set api_key_env, and the variable that it names" in failure(server, api_key_env="")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.answer = lambda *_: Answer(status=401, body='{"error": {"message": "Incorrect API key: sk-very***6789"}}')
    assert "answered 401: it refuses the key that OPENAI_API_KEY holds (" in failure(server)
    assert len(server.requests) == 3


def test_a_wrong_model_is_told_with_those_that_there_are(server: FakeEndpoint):
    server.models = {f"other-{n}": "x" for n in range(20)} | {"r1-tiny": "x"}
    server.answer = lambda *_: Answer(status=404, body='{"error": {"message": "no such model"}}')
    told = failure(server, model="r1-tinny")
    assert "has no model 'r1-tinny'; it has r1-tiny, other-" in told and ", … (" in told
    assert "does it serve kind completions?" in failure(server, model="r1-tiny", kind="completions")
    server.answer = lambda *_: Answer(status=400)
    assert "answered 400; it lists no model 'r1-tinny'; it has r1-tiny" in failure(server, model="r1-tinny")


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_nobody_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint_http, "LISTING_PAUSE_S", 2.0)
    url = f"http://127.0.0.1:{closed_port()}/v1"
    start = time.monotonic()
    assert f"the endpoint {url} cannot be reached: connection refused; is a server running there?" in failure(url, 50)
    assert time.monotonic() - start < 2
    assert "host name is not known" in failure("http://no-such-host.invalid/v1")


def test_http_where_https_is_asked_for(server: FakeEndpoint):
    assert "it does not speak TLS there" in failure(server.url.replace("http:", "https:"))


@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_endpoint_that_dies_midway(concurrency: int):
    finished: list[int] = []
    with fake_endpoint() as server:

        def answer(request: dict[str, Any], attempt: int) -> Answer:
            if request["seed"] >= 10:
                threading.Thread(target=server.die).start()
                server.release.wait(5)
                return Answer(drop=True)
            return echo(request, attempt)

        server.answer = answer
        with Endpoint(config(server, concurrency=concurrency, retries=3)) as endpoint:
            with pytest.raises(EndpointError, match=r"given up after 4 attempts|connection refused") as caught:
                for found, _ in endpoint.draw(job(seed) for seed in range(1000)):
                    finished.append(found.seed)
            assert server.url in str(caught.value)
            assert endpoint.faults["connection"] >= 4
    assert sorted(finished) == list(range(10))


def test_what_finished_is_yielded_before_the_error(server: FakeEndpoint):
    """A consumer that is slow gets all that was ready when the error happened."""
    ready = threading.Event()

    def answer(request: dict[str, Any], attempt: int) -> Answer:
        if request["seed"] < 5:
            return echo(request, attempt)
        while len(server.requests) < 6 or server.at_once > 1:
            time.sleep(0.001)
        time.sleep(0.1)
        ready.set()
        return Answer(status=400)

    server.answer = answer
    seen = []
    with Endpoint(config(server, concurrency=6)) as endpoint:
        drawing = endpoint.draw(job(seed) for seed in range(6))
        seen.append(next(drawing)[0].seed)
        assert ready.wait(5)
        time.sleep(0.1)
        with pytest.raises(EndpointError):
            seen.extend(found.seed for found, _ in drawing)
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_nothing_is_asked_any_more_once_it_failed(server: FakeEndpoint):
    def answer(request: dict[str, Any], attempt: int) -> Answer:
        if request["seed"] == 0:
            return echo(request, attempt)
        return Answer(status=400, wait_s=0.1) if request["seed"] == 1 else Answer(status=500)

    server.answer = answer
    with Endpoint(config(server, retries=10**6)) as endpoint:
        drawing = endpoint.draw(job(seed) for seed in range(3))
        next(drawing)
        time.sleep(0.6)  # a consumer that is busy
        asked = len(server.requests)
        time.sleep(0.1)
        assert len(server.requests) == asked > 3
        with pytest.raises(EndpointError, match="answered 400"):
            next(drawing)


# --- how much at once


def test_no_more_in_flight_than_allowed_and_jobs_are_pulled_lazily(server: FakeEndpoint):
    pulled = 0

    def jobs() -> Iterator[EndpointJob]:
        nonlocal pulled
        for seed in range(10**9):
            pulled += 1
            yield job(seed)

    server.answer = lambda request, _: replace(whole("a"), wait_s=0.01)
    with Endpoint(config(server, concurrency=3)) as endpoint:
        drawing = endpoint.draw(jobs())
        for n in range(1, 20):
            next(drawing)
            assert pulled <= n + 2 * 3
    assert server.most_at_once == 3


def test_requests_go_on_while_the_caller_works(server: FakeEndpoint):
    with Endpoint(config(server, concurrency=4)) as endpoint:
        drawing = endpoint.draw(job(seed) for seed in range(100))
        next(drawing)
        end = time.monotonic() + 5
        while len(server.requests) < 8 and time.monotonic() < end:
            time.sleep(0.005)
        assert len(server.requests) == 8


def test_no_more_a_minute_than_allowed(server: FakeEndpoint):
    start = time.monotonic()
    draw(server, 4, requests_per_minute=600)
    assert 0.3 <= time.monotonic() - start < 3


def test_a_slow_completion_holds_up_no_other(server: FakeEndpoint):
    server.answer = lambda request, _: replace(whole("a"), wait_s=0.3 if request["seed"] == 0 else 0.0)
    with Endpoint(config(server, concurrency=2)) as endpoint:
        order = [found.seed for found, _ in endpoint.draw(job(seed) for seed in range(5))]
    assert order[-1] == 0 and len(server.requests) == 5


# --- ends


def test_a_consumer_that_stops_early(server: FakeEndpoint):
    server.answer = lambda request, attempt: (
        echo(request, attempt) if request["seed"] == 0 else replace(whole("late"), wait_s=5)
    )
    endpoint = Endpoint(config(server))
    for found, _ in endpoint.draw(job(seed) for seed in range(9)):
        assert found.seed == 0
        break  # the generator is dropped here
    server.answer = echo
    drawing = endpoint.draw(job(seed) for seed in range(10**9))
    next(drawing)
    drawing.close()
    drawing = endpoint.draw(job(seed) for seed in range(10**9))
    next(drawing)
    with pytest.raises(RuntimeError, match="draws already"):
        next(endpoint.draw([job(1)]))
    endpoint.close()
    with pytest.raises(EndpointError, match="closed during a drawing"):
        list(drawing)
    endpoint.close()
    with pytest.raises(RuntimeError, match="is closed"):
        next(endpoint.draw([job(1)]))


def test_the_look_up_of_a_host_is_over_when_it_is_closed(server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch):
    looked, look_up = threading.Event(), socket.getaddrinfo

    def slow(*arguments: Any, **options: Any) -> Any:
        looked.set()
        time.sleep(0.3)
        return look_up(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    endpoint = Endpoint(config(server.url.replace("127.0.0.1", "localhost")))
    timer = threading.Timer(0.1, endpoint.close)
    timer.start()
    with pytest.raises(EndpointError, match="closed during a drawing"):
        list(endpoint.draw([job(0)]))
    assert looked.is_set() and not [thread.name for thread in threading.enumerate() if "asyncio" in thread.name]
    timer.join()


def test_close_from_another_thread_wakes_the_caller(server: FakeEndpoint):
    server.answer = lambda *_: Answer(wait_s=20)
    endpoint = Endpoint(config(server))
    timer = threading.Timer(0.1, endpoint.close)
    timer.start()
    start = time.monotonic()
    with pytest.raises(EndpointError, match="closed during a drawing"):
        list(endpoint.draw([job(0)]))
    assert time.monotonic() - start < 5
    timer.join()


def test_jobs_that_cannot_be_made(server: FakeEndpoint):
    def jobs() -> Iterator[EndpointJob]:
        yield job(0)
        raise KeyError("no such column")

    with Endpoint(config(server)) as endpoint, pytest.raises(KeyError, match="no such column"):
        list(endpoint.draw(jobs()))
    with Endpoint(config(server)) as endpoint, pytest.raises(AssertionError, match="no messages"):
        list(endpoint.draw([replace(job(0), messages=())]))


def test_what_goes_wrong_in_the_thread_is_raised_in_the_callers(server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch):
    def full(**_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(endpoint_http.aiohttp, "ClientSession", full)
    with Endpoint(config(server)) as endpoint, pytest.raises(OSError, match="Too many open files"):
        list(endpoint.draw(job(seed) for seed in range(100)))
    gc.collect()  # finds tasks that were left on the loop


def test_nothing_to_draw(server: FakeEndpoint):
    assert draw(server, 0) == {}
    assert server.listed == 0


def test_interrupted_by_the_keyboard(server: FakeEndpoint, tmp_path: Path):
    server.answer = lambda *_: Answer(wait_s=20)
    program = f"""
from rollout.endpoint import Endpoint, EndpointConfig, EndpointJob
from rollout.types import Problem, SamplingParams
import threading
job = EndpointJob(problem=Problem(id="p", prompt="q"), messages=({{"role": "user", "content": "q"}},),
                  sample_index=0, seed=0, params=SamplingParams())
try:
    with Endpoint(EndpointConfig(url={server.url!r}, model="m")) as endpoint:
        for _ in endpoint.draw([job] * 9):
            pass
except KeyboardInterrupt:
    print("left:", [thread.name for thread in threading.enumerate()])
"""
    # Where these tests are started in the background, Ctrl-C would be ignored by what they start.
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    end = time.monotonic() + 20
    while not server.requests and time.monotonic() < end:
        time.sleep(0.01)
    assert server.requests
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "left: ['MainThread']\n")
    assert time.monotonic() - start < 5


# --- proxies


def test_no_proxy_stands_before_this_machine(server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert draw(server)[0].text == "seed 0"
    assert draw(server.url.replace("127.0.0.1", "localhost"))[0].text == "seed 0"
    assert "the proxy that the environment names does not answer" in failure("http://10.255.255.1/v1")
