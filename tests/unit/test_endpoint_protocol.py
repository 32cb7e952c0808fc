"""What is said to an endpoint and how its replies are read: values in, values out."""

from __future__ import annotations

import email.utils
import json
import math
import os
import time
from dataclasses import replace
from typing import Any

import pytest

from rollout.endpoint_http import proxy_of
from rollout.endpoint_protocol import Fault, models_of, one_line, pause_asked, read_reply, request_body, status_fault
from rollout.template import split_reasoning
from tests.unit.fake_endpoint import Answer, config, job, whole

KEY = "sk-very-secret-0123456789"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"url": "localhost:8000/v1"}, "base address of an API, such as http"),
        ({"url": "ftp://h/v1"}, "base address"),
        ({"url": "http:///v1"}, "base address"),
        ({"url": "http://h:99999/v1"}, "base address"),
        ({"url": "http://h h/v1"}, "base address"),
        ({"url": None}, "base address"),
        ({"url": "http://h/v1/chat/completions/"}, "http://h/v1 without /chat/completions"),
        ({"url": "http://h/v1/completions"}, "http://h/v1 without /completions"),
        ({"url": f"http://me:{KEY}@h/v1"}, "must hold no user, password"),
        ({"url": f"http://h/v1?key={KEY}"}, "must hold no user, password"),
        ({"model": " "}, "model must name"),
        ({"api_key_env": None}, "must be the NAME of an environment variable"),
        ({"api_key_env": KEY}, "must be the NAME of an environment variable"),
        ({"kind": "chats"}, "kind must be chat or completions, got 'chats'"),
        ({"concurrency": 0}, "concurrency must be a whole number >= 1, got 0"),
        ({"concurrency": True}, "concurrency"),
        ({"concurrency": 2.5}, "concurrency"),
        ({"retries": -1}, "retries must be a whole number >= 0, got -1"),
        ({"requests_per_minute": -1}, "requests_per_minute"),
        ({"timeout_s": 0}, "timeout_s must be a number of seconds > 0, got 0"),
        ({"timeout_s": math.inf}, "timeout_s"),
        ({"timeout_s": math.nan}, "timeout_s"),
        ({"timeout_s": "9"}, "timeout_s"),
    ],
)
def test_what_cannot_be_configured(changed: dict[str, Any], told: str):
    with pytest.raises(ValueError) as caught:
        config("http://h/v1", **changed)
    assert told in str(caught.value) and "\n" not in str(caught.value) and KEY not in str(caught.value)


def test_vllm_is_told_what_it_would_take_from_the_models_folder():
    told = {"min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
    for top_k, sent in ((0, -1), (5, 5)):
        body = request_body(config("http://h/v1"), job(0, top_k=top_k), vllm=True)
        assert body["top_k"] == sent and told.items() <= body.items()
    assert not {"top_k", *told} & set(request_body(config("http://h/v1"), job(0)))


def test_a_rendered_template_gets_no_second_token_in_front():
    rendered = replace(job(0), add_special_tokens=False)
    assert request_body(config("http://h/v1", kind="completions"), rendered)["add_special_tokens"] is False
    assert "add_special_tokens" not in request_body(config("http://h/v1"), rendered)


def test_what_is_no_list_of_models():
    assert models_of(b'{"data": [{"id": "m", "owned_by": "vllm"}, {"id": 3}]}') == {"m": "vllm"}
    for other in (b"{", b"[]", b"{}", b'{"data": 3}', b'{"data": [3]}', b'{"data": [{}]}', b"[" * 100_000):
        assert models_of(other) == {}


def test_a_reasoning_that_is_kept_apart_is_put_in_front():
    def text(answer: Answer) -> str:
        return read_reply("chat", answer.body.encode()).text

    for name in ("reasoning_content", "reasoning"):
        joined = text(whole("The answer is 6.", **{name: "2*3=6"}))
        assert joined == "<think>2*3=6</think>The answer is 6."
        for forced in (True, False):
            found = split_reasoning(joined, forced_think=forced)
            assert (found.thinking, found.answer, found.closed) == ("2*3=6", "The answer is 6.", True)
    truncated = text(whole(None, "length", reasoning_content="2*3"))
    assert not split_reasoning(truncated).closed and truncated == "<think>2*3"
    assert text(whole("", "stop", reasoning_content="2*3")) == "<think>2*3</think>"
    assert text(whole("6", "length", reasoning_content="2*3")) == "<think>2*3</think>6"
    assert text(whole("6", reasoning=None, reasoning_content={"not": "text"})) == "6"


@pytest.mark.parametrize(
    ("answer", "text", "finish"),
    [
        (whole("so", "length"), "so", "length"),
        (whole("so", "eos_token"), "so", "stop"),
        (whole(None, "content_filter"), "", "content_filter"),
        (whole(None, "tool_calls", tool_calls=[{"id": "1"}]), "", "tool_calls"),
        (whole(None, "function_call"), "", "tool_calls"),
        (whole(None, "stop", refusal="I will not."), "I will not.", "refusal"),
        (whole("6", "stop", refusal=None), "6", "stop"),
        (whole(None), "", "stop"),
        (whole("a", "repetition\n!"), "a", "repetition !"),
        (whole("half \ud800 pair"), "half ? pair", "stop"),
    ],
)
def test_endings_are_told_apart(answer: Answer, text: str, finish: str):
    drawn = read_reply("chat", answer.body.encode())
    assert (drawn.text, drawn.finish_reason) == (text, finish)


@pytest.mark.parametrize(
    "usage", [None, [], {}, {"completion_tokens": None}, {"completion_tokens": True}, {"completion_tokens": -1}]
)
def test_tokens_that_nobody_counted_are_unknown(usage: object):
    reply = {"choices": [{"text": "a", "finish_reason": "stop"}], "usage": usage}
    assert read_reply("completions", json.dumps(reply).encode()).tokens is None


NO_COMPLETIONS = [
    (b"", "no JSON: ''"),
    (b"garbage", "no JSON: 'garbage'"),
    (b"\xff\xfe\x00", "no JSON"),
    (b"[" * 100_000, "no JSON"),
    (b"[]", "no object but list"),
    (b"null", "no object but NoneType"),
    (b"{}", "without choices"),
    (b'{"choices": []}', "without choices"),
    (b'{"choices": [3]}', "without choices"),
    (b'{"choices": null, "error": {"message": "no GPU\\nleft", "code": 502}}', "without choices: no GPU left"),
    (b'{"choices": [{"message": {"content": "a"}}]}', "did not say why"),
    (b'{"choices": [{"message": {"content": "a"}, "finish_reason": "abort"}]}', "broke a completion off"),
    (b'{"choices": [{"message": {"content": "a"}, "finish_reason": "error"}]}', "broke a completion off"),
    (b'{"choices": [{"text": "a", "finish_reason": "stop"}]}', "without a message"),
    (b'{"choices": [{"message": {"content": ["a"]}, "finish_reason": "stop"}]}', "no text but list"),
]


@pytest.mark.parametrize(("body", "told"), NO_COMPLETIONS)
def test_what_is_no_completion(body: bytes, told: str):
    with pytest.raises(Fault, match=told) as caught:
        read_reply("chat", body)
    assert caught.value.kind == "reply" and not caught.value.final


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({}, None),
        ({"Retry-After": "2"}, 2.0),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": "2", "Retry-After-Ms": "1500"}, 1.5),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "Mon, 01 Jan 2001 00:00:00 GMT"}, 0.0),
    ],
)
def test_the_pause_that_is_asked_for(headers: dict[str, str], pause: float | None):
    assert pause_asked(headers) == pause


def test_a_pause_may_be_a_date():
    assert pause_asked({"Retry-After": email.utils.formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(
        30, abs=2
    )


def test_what_is_quoted_is_one_short_line_without_the_key():
    assert one_line("a\n\tb\x1b[31m \ud800c") == "a b [31m c"
    assert len(one_line("x" * 999)) == 200
    body = json.dumps({"error": {"message": "x" * 190 + KEY}}).encode()  # a cut in its middle must not save its start
    assert KEY[:6] not in status_fault(400, {}, body, KEY).told
    for layout in ({"error": "full"}, {"error": {"message": "full"}}, {"message": "full"}, {"detail": "full"}):
        assert status_fault(503, {}, json.dumps(layout).encode(), "").told == "answered 503: full"


def test_which_proxy(monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert proxy_of(config("https://outside.example/v1")) == "http://proxy:3128"
    assert proxy_of(config("http://outside.example/v1")) is None
    assert proxy_of(config("https://inside.example/v1")) is None
    for local in ("localhost", "127.0.0.1", "127.1.2.3", "[::1]", "0.0.0.0", "x.localhost"):
        assert config(f"https://{local}:8000/v1").is_local and proxy_of(config(f"https://{local}:8000/v1")) is None
    assert not config("https://10.0.0.1/v1").is_local
