"""One request to an OpenAI-compatible endpoint: a completion, or a :class:`Fault` that says why there is none."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from rollout.endpoint_protocol import (
    KINDS,
    Drawn,
    EndpointConfig,
    EndpointError,
    EndpointJob,
    Fault,
    models_of,
    names_like,
    one_line,
    read_reply,
    request_body,
    status_fault,
)

CONNECT_S = 10.0  # to open a connection, and to list the models
LISTINGS, LISTING_PAUSE_S = 3, 1.0  # attempts to list the models, and the pause between them
MAX_REPLY_BYTES = 64 << 20  # 32,768 tokens are 0.2 MB: more is no completion


@dataclass
class Acquaintance:
    """What is known of an endpoint from one client to the next.

    Attributes:
        models: ``{model: owner}``; None before it was asked.
        heard: a reply came, of whatever kind.
        completions: replies that were completions.
    """

    models: dict[str, str] | None = None
    heard: bool = False
    completions: int = 0


class Client:
    """Connections to one endpoint, for one event loop: ``async with Client(...) as client``."""

    def __init__(self, config: EndpointConfig, key: str, known: Acquaintance) -> None:
        self.config, self._key, self.known = config, key, known

    async def __aenter__(self) -> Client:
        self._listing = asyncio.Lock()
        self._proxy = proxy_of(self.config)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # whoever asks limits the requests
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def complete(self, job: EndpointJob) -> Drawn:
        """One attempt to draw a completion.

        Raises:
            Fault: it brought none.
        """
        config = self.config
        models = await self._models()
        body = request_body(config, job, vllm="vllm" in models.values())
        status, headers, data = await self._exchange("POST", KINDS[config.kind], body, config.timeout_s)
        if status != 200:
            raise self._explained(status_fault(status, headers, data, self._key), models)
        drawn = read_reply(config.kind, data, self._key)
        self.known.completions += 1
        return drawn

    def _explained(self, fault: Fault, models: Mapping[str, str]) -> Fault:
        """Says more about a refusal where more is known."""
        config, key = self.config, self.config.api_key_env
        missing = "" if not models or config.model in models else f"no model {config.model!r}"
        if missing:
            missing += f"; it has {names_like(config.model, models)}"
        if fault.kind in ("401", "403") and not self._key:
            fault.told += f": it wants a key; set {key or 'api_key_env, and the variable that it names'}"
        elif fault.kind == "401":
            fault.told += f": it refuses the key that {key} holds"
        elif fault.kind == "404" and missing:
            fault.told = f"has {missing}"
        elif fault.kind in ("400", "403", "422") and missing:
            fault.told += f"; it lists {missing}"
        elif fault.kind == "404" and not models:
            fault.told += "; url must be the base address of the API, which mostly ends in /v1"
        elif fault.kind == "404":
            fault.told += f"; does it serve kind {config.kind}?"
        return fault

    async def _models(self) -> dict[str, str]:
        """``{model: owner}`` of what the endpoint lists; empty where it lists nothing. Asked once.

        Raises:
            Fault: there is no endpoint.
        """
        known, timeout_s = self.known, min(CONNECT_S, self.config.timeout_s)
        async with self._listing:
            for attempt in range(LISTINGS if known.models is None else 0):
                await asyncio.sleep(LISTING_PAUSE_S * attempt)
                try:
                    status, _, data = await self._exchange("GET", "/models", None, timeout_s)
                except Fault as fault:
                    if fault.final_at_first and not known.heard:
                        raise
                else:
                    known.models = models_of(data) if status == 200 else {}
                    if status not in (408, 429, 500, 502, 503, 504):  # these pass; many endpoints have no such list
                        break
            known.models = known.models or {}
            return known.models

    async def _exchange(
        self, method: str, path: str, body: object, timeout_s: float
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of one request; redirections are not followed.

        Raises:
            Fault: no whole reply came.
        """
        data = bytearray()
        options: dict[str, Any] = {"json": body, "proxy": self._proxy, "allow_redirects": False}
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(method, self.config.url + path, **options) as reply,
            ):
                self.known.heard = True
                async for part in reply.content.iter_any():
                    data += part
                    if len(data) > MAX_REPLY_BYTES:
                        raise Fault("reply", f"answered more than {MAX_REPLY_BYTES >> 20} MiB")
                return reply.status, reply.headers, bytes(data)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            told = f"cannot be reached: {_why(error, self._key)}"
            certificate = isinstance(error, aiohttp.ClientConnectorCertificateError)
            raise Fault("connection", told, final=certificate, final_at_first=True) from None
        except TimeoutError:
            raise Fault("timeout", f"gave no whole answer in {timeout_s:g} s (timeout_s)") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Fault("connection", f"broke the connection off ({type(error).__name__})") from None


def _why(error: Exception, key: str) -> str:
    """Why a connection could not be opened."""
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return "the proxy that the environment names does not answer"
    if not isinstance(error, aiohttp.ClientConnectorError):
        return f"no connection in {CONNECT_S:g} s"
    cause = error.certificate_error if isinstance(error, aiohttp.ClientConnectorCertificateError) else error.os_error
    if isinstance(cause, socket.gaierror):
        return "its host name is not known"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError):
        return "it does not speak TLS there; is it http, not https?"
    if isinstance(cause, OSError) and cause.errno == errno.ECONNREFUSED:
        return "connection refused; is a server running there?"
    return one_line(str(cause), key)


def key_of(variable: str) -> str:
    """The key that an environment variable holds; empty where it is not set.

    Raises:
        EndpointError: what it holds cannot be sent. It is not quoted.
    """
    key = os.environ.get(variable, "").strip() if variable else ""
    if not key.isascii() or not key.isprintable() or " " in key:
        raise EndpointError(f"the environment variable {variable} holds no key: it has spaces or special characters")
    return key


def proxy_of(config: EndpointConfig) -> str | None:
    """The proxy that the environment names for the address; none for this machine.

    Found here and not by aiohttp, which would also look for passwords in ~/.netrc.
    """
    parts = urlsplit(config.url)
    if config.is_local or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")
