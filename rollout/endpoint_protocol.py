"""What is said to an OpenAI-compatible endpoint, and how its replies are read. Values only: no network, no threads.

Two kinds: ``chat`` sends messages to ``/chat/completions``, and the endpoint applies its own chat template;
``completions`` sends a rendered prompt to ``/completions``. Whatever is no whole completion is a :class:`Fault`.
"""

from __future__ import annotations

import difflib
import email.utils
import ipaddress
import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from rollout.template import THINK_CLOSE, THINK_OPEN
from rollout.types import Problem, SamplingParams

KINDS = {"chat": "/chat/completions", "completions": "/completions"}
SHOWN_CHARACTERS = 200  # of an endpoint's own words that an error quotes

# vLLM fills in what a request leaves out from the model's generation_config.json: a top-k of 20 or a repetition penalty
# that nobody asked for. So these are always said to it. Its text would also lack special tokens, which ours keeps.
_VLLM_NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
}
_ENDINGS = {"eos_token": "stop", "stop_sequence": "stop", "function_call": "tool_calls"}  # other names of the same
_CUT_OFF = ("abort", "error")  # endings of a completion that the endpoint itself broke off


class EndpointError(ValueError):
    """The endpoint cannot be used, or no longer; the text is one line that says why and how to mend it."""


class Fault(Exception):
    """One attempt that brought no completion.

    Attributes:
        kind: the status as text, or ``timeout``, ``connection``, ``reply`` (a reply that is no completion).
        told: what happened, as the rest of a sentence that begins with the endpoint.
        final: trying again cannot help.
        final_at_first: nor can it as long as there was never anything better: nothing is at the address, or something
            else than a completion API.
        pause_s: seconds that the endpoint asks to wait; None when it does not say.
    """

    def __init__(
        self, kind: str, told: str, *, final: bool = False, final_at_first: bool = False, pause_s: float | None = None
    ) -> None:
        super().__init__(told)
        self.kind, self.told, self.final, self.final_at_first, self.pause_s = kind, told, final, final_at_first, pause_s


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """An endpoint and how hard it may be asked.

    Attributes:
        url: base address, such as ``http://localhost:8000/v1``; a slash at its end is dropped.
        model: name of the model at the endpoint.
        api_key_env: NAME of the environment variable that holds the key; empty, or a variable that is not set: no key
            is sent.
        kind: ``chat`` (messages; the endpoint's chat template) or ``completions`` (a rendered prompt).
        concurrency: most requests in flight, >= 1.
        timeout_s: seconds of one attempt, from the first byte out to the last byte in, > 0; also the longest pause that
            the endpoint may ask for.
        retries: further attempts for one completion after a fault that may pass, >= 0.
        requests_per_minute: most attempts a minute, evenly spaced; 0: no limit.
    """

    url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    kind: str = "chat"
    concurrency: int = 16
    timeout_s: float = 600.0
    retries: int = 6
    requests_per_minute: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _base_address(self.url))
        if not isinstance(self.model, str) or not self.model.strip():
            raise ValueError("model must name a model at the endpoint, got nothing")
        name = self.api_key_env
        if not isinstance(name, str) or not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", name):
            # Not echoed: it may be the key itself.
            raise ValueError("api_key_env must be the NAME of an environment variable that holds the key (or empty)")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be {' or '.join(KINDS)}, got {self.kind!r}")
        for name, least in (("concurrency", 1), ("retries", 0), ("requests_per_minute", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
        if not isinstance(self.timeout_s, int | float) or not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s must be a number of seconds > 0, got {self.timeout_s!r}")

    @property
    def is_local(self) -> bool:
        """True when the address is this machine's own: no proxy stands between."""
        host = urlsplit(self.url).hostname or ""
        if host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return address.is_loopback or address.is_unspecified


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointJob:
    """One completion to draw.

    Attributes:
        problem: what is asked; errors name its id.
        text: the rendered prompt (kind ``completions``).
        messages: ``{"role", "content"}`` in order (kind ``chat``).
        sample_index: position among the siblings of the problem, 0-based.
        seed: sampling seed of this request, sent as it is.
        params: how tokens are drawn.
        add_special_tokens: False when ``text`` has its special tokens already (a rendered chat template): the endpoint
            is asked not to put a second beginning-of-sequence token in front. Kind ``completions`` only.
    """

    problem: Problem
    text: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    sample_index: int
    seed: int
    params: SamplingParams
    add_special_tokens: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A completion as an endpoint tells it: text and counts, neither token ids nor log-probabilities.

    Attributes:
        text: what the model wrote; a reasoning that the endpoint keeps apart stands in front, as
            ``<think>…</think>`` (without the closing tag when it was truncated).
        finish_reason: ``stop`` | ``length`` (truncated) | ``content_filter`` | ``tool_calls`` | ``refusal`` (then the
            text is the refusal), else the endpoint's own word.
        tokens: sampled tokens as the endpoint counts them, reasoning included; None when it does not say.
        prompt_tokens: tokens of the prompt; None when it does not say.
        seed: the sampling seed that was sent.
        seconds: duration of the attempt that brought it.
        attempts: attempts that it took, >= 1.
    """

    text: str
    finish_reason: str
    tokens: int | None
    prompt_tokens: int | None
    seed: int = 0
    seconds: float = 0.0
    attempts: int = 1


def request_body(config: EndpointConfig, job: EndpointJob, *, vllm: bool = False) -> dict[str, Any]:
    """The JSON object of one request.

    ``top_k`` is no field of OpenAI's: without a limit (0) it is sent to vLLM alone.
    """
    params = job.params
    body: dict[str, Any] = {"model": config.model}
    if config.kind == "chat":
        assert job.messages, f"problem {job.problem.id!r} has no messages to send"
        body["messages"] = [dict(message) for message in job.messages]
    else:
        body["prompt"] = job.text
        if not job.add_special_tokens:
            body["add_special_tokens"] = False
    body |= {"max_tokens": params.max_tokens, "temperature": params.temperature, "top_p": params.top_p}
    body["seed"] = job.seed
    if params.stop:
        body["stop"] = list(params.stop)
    if params.top_k:
        body["top_k"] = params.top_k
    if vllm:
        body |= {"top_k": params.top_k or -1, **_VLLM_NEUTRAL}
    return body


def read_reply(kind: str, data: bytes, secret: str = "") -> Drawn:
    """The completion in the body of a reply with status 200.

    Args:
        kind: ``chat`` | ``completions``.
        secret: the key, which no error quotes.

    Raises:
        Fault: it is no JSON, an error, or not one whole completion.
    """
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError):
        shown = one_line(data[: 4 * SHOWN_CHARACTERS].decode(errors="replace"), secret)
        page = data.lstrip()[:1] == b"<"  # HTML: a front page, or the wrong path
        hint = "; url must be the base address of the API, which mostly ends in /v1" if page else ""
        raise Fault("reply", f"answered what is no JSON: {shown[:60]!r}{hint}", final_at_first=page) from None
    if not isinstance(reply, dict):
        raise Fault("reply", f"answered JSON that is no object but {type(reply).__name__}")
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Fault("reply", f"answered without choices{_said(reply, secret)}")
    finish = choices[0].get("finish_reason")
    if not isinstance(finish, str) or not finish:
        raise Fault("reply", "did not say why the completion ended (finish_reason)")
    if finish in _CUT_OFF:
        raise Fault("reply", f"broke a completion off (finish_reason {finish})")
    usage = reply.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    drawn = Drawn(
        text="",
        finish_reason=_ENDINGS.get(finish, one_line(finish, secret)),
        tokens=_count(usage.get("completion_tokens")),
        prompt_tokens=_count(usage.get("prompt_tokens")),
    )
    return _with_message(drawn, choices[0]) if kind == "chat" else replace(drawn, text=_string(choices[0], "text"))


def _with_message(drawn: Drawn, choice: Mapping[str, Any]) -> Drawn:
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Fault("reply", "answered a choice without a message: is kind chat right?")
    text = _string(message, "content")
    # Two names are in use. Neither is OpenAI's, so anything that is no text counts as none.
    reasonings = (message.get("reasoning_content"), message.get("reasoning"))
    reasoning = next((found for found in reasonings if isinstance(found, str) and found), "")
    refusal = message.get("refusal")
    if isinstance(refusal, str) and refusal and not text:
        return replace(drawn, text=_sound(refusal), finish_reason="refusal")
    if reasoning:
        truncated = not text and drawn.finish_reason == "length"
        text = f"{THINK_OPEN}{_sound(reasoning)}{'' if truncated else THINK_CLOSE}{text}"
    return replace(drawn, text=text)


def status_fault(status: int, headers: Mapping[str, str], data: bytes, secret: str) -> Fault:
    """What a reply with a status other than 200 means.

    Args:
        secret: the key, which must not be quoted; an endpoint may repeat it.
    """
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError):
        reply = None
    reply = reply if isinstance(reply, dict) else {}
    told = f"answered {status}{_said(reply, secret)}"
    if status == 429 or status >= 500 or status in (408, 409, 425):
        error = reply.get("error")
        if isinstance(error, dict) and error.get("code") == "insufficient_quota":  # OpenAI's 429 for an empty account
            return Fault(str(status), told, final=True)
        return Fault(str(status), told, pause_s=pause_asked(headers))
    if status == 401:  # not quoted: such replies repeat parts of the key
        return Fault("401", "answered 401", final=True)
    if 300 <= status < 400:
        told += f", a redirection to {one_line(headers.get('Location', 'nowhere'), secret)!r}: give url as it should be"
    return Fault(str(status), told, final=True)


def pause_asked(headers: Mapping[str, str]) -> float | None:
    """Seconds that ``Retry-After`` (seconds or a date) or ``Retry-After-Ms`` asks to wait; None without a sound one."""
    pause = _number(headers.get("Retry-After-Ms", "")) / 1000
    if math.isnan(pause):
        asked = headers.get("Retry-After", "")
        pause = _number(asked)
        if math.isnan(pause) and asked:
            try:
                pause = max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
            except (ValueError, OverflowError):
                return None
    return pause if pause >= 0 else None


def models_of(data: bytes) -> dict[str, str]:
    """``{model: who owns it}`` of a reply to ``/models``; vLLM says "vllm". Empty when it is no such list."""
    try:
        rows = json.loads(data)["data"]
        return {row["id"]: str(row.get("owned_by")) for row in rows if isinstance(row["id"], str)}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}


def names_like(model: str, known: Iterable[str], most: int = 8) -> str:
    """Up to ``most`` known names for an error line, the most similar ones first."""
    known = list(known)
    near = difflib.get_close_matches(model, known, n=most, cutoff=0.3)
    names = near + [name for name in known if name not in near]
    return ", ".join(one_line(name) for name in names[:most]) + (", …" if len(names) > most else "")


def one_line(text: str, secret: str = "") -> str:
    """At most :data:`SHOWN_CHARACTERS` printable characters of what an endpoint says, without the key."""
    if secret:
        text = text.replace(secret, "(the key)")
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _said(reply: Mapping[str, Any], secret: str) -> str:
    """``": message"`` of an error reply, or nothing. Four layouts are in use."""
    error = reply.get("error")
    found = error.get("message") if isinstance(error, dict) else error
    for message in (found, reply.get("message"), reply.get("detail")):
        if message and isinstance(message, str):
            return f": {one_line(message, secret)}"
    return ""


def _string(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Fault("reply", f"answered a {name} that is no text but {type(value).__name__}")
    return _sound(value)


def _sound(text: str) -> str:
    """Text that can be written to a file: half a surrogate pair, which JSON allows, becomes a question mark."""
    return text.encode(errors="replace").decode()


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _base_address(url: str) -> str:
    """The address without a slash at its end.

    Raises:
        ValueError: says what is wrong with it. Does not repeat it where it may hold a password.
    """
    wanted = "url must be the base address of an API, such as http://localhost:8000/v1"
    if not isinstance(url, str):
        raise ValueError(f"{wanted}, got {url!r}")
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # not echoed: it was not looked at for a password
        raise ValueError(wanted) from None
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("url must hold no user, password, query or fragment: give the key in the environment")
    if not sound or re.search(r"\s", url):
        raise ValueError(f"{wanted}, got {one_line(url)!r}")
    url = url.rstrip("/")
    for path in KINDS.values():
        if url.endswith(path):
            raise ValueError(f"url must be the base address: {url.removesuffix(path)} without {path}")
    return url
