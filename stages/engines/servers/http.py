"""HTTP requests to one server, and the outcome of each: an answer, or an error that says whether to try again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import httpx

from draftsmith.artifacts.errors import DraftsmithError, RetryableError

Json: TypeAlias = dict[str, Any]  # an object of a server's HTTP API
_FULL_503 = ("queue", "waiting timeout", "higher priority")  # parts of SGLang's messages when its queue is full
_TRANSIENT_4XX = frozenset({408, 425})  # from a router's queue
_UNAUTHORIZED = frozenset({401, 403})
_QUERY_TIMEOUT_S = 120.0  # for the handshake: the first generation may compile kernels


@dataclass(frozen=True)
class ServerAnswer:
    """The body of a finished answer, and its times as the client measured them."""

    body: Json
    seconds: float = 0.0
    first_token_seconds: float = float("nan")
    url: str = ""  # the server's


class RequestLostError(Exception):
    """An attempt failed that may succeed when repeated: no connection, a 5xx answer, an abort by the server."""


class ServerFullError(RequestLostError):
    """The server takes no requests at the moment. wait_s: the wait that it reported, if any."""

    def __init__(self, reason: str, wait_s: float = 0.0):
        super().__init__(reason)
        self.wait_s = wait_s


class ServerStalledError(RequestLostError):
    """The server is up, but computes nothing at the moment."""


class RefusedRequestError(DraftsmithError):
    """The server refuses this request, and would refuse it again."""


async def get_json(client: httpx.AsyncClient, url: str, name: str) -> Json:
    """Return the body of an endpoint."""
    response = await query(client, "GET", f"{url}/{name}")
    if response.status_code == 404:
        raise wrong_server(url, f"has no /{name}. Check the URL and the server's release.")
    check_status(name, url, response.status_code, response.text)
    return json_object(response)


async def query(
    client: httpx.AsyncClient, method: str, url: str, body: Json | None = None, timeout_s: float = _QUERY_TIMEOUT_S
) -> httpx.Response:
    """Send a request and return the answer. Raises RequestLostError if none comes."""
    try:
        return await client.request(method, url, json=body, timeout=timeout_s)
    except httpx.HTTPError as error:
        raise RequestLostError(f"cannot be reached ({type(error).__name__} {error})") from error


def json_object(response: httpx.Response) -> Json:
    """Return the body of an answer. Raises DraftsmithError if it is not a JSON object."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise DraftsmithError(
            f"engine: {response.url} did not return a JSON object. Check the URL and the server's release."
        )
    return body


@contextmanager
def reachable(url: str) -> Iterator[None]:
    """Raise RetryableError if the server does not answer the requests inside."""
    try:
        yield
    except RequestLostError as error:
        raise RetryableError(
            f"engine: {url} {error}. Check that the server runs, then run the same command."
        ) from error


def wrong_server(url: str, reason: str) -> DraftsmithError:
    """Return the error of a server that does not fit the config. reason: cause and remedy, without a subject."""
    return DraftsmithError(f"engine: the server {url} {reason}")


@contextmanager
def lost_unless_readable() -> Iterator[None]:
    """Raise RequestLostError if the request inside gets no answer over HTTP, or an answer of another form."""
    try:
        yield
    except httpx.HTTPError as error:
        raise lost(error) from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RequestLostError(f"gave an answer that cannot be read ({type(error).__name__}: {error})") from error


@asynccontextmanager
async def health_check(limit_s: float) -> AsyncIterator[None]:
    """Raise RequestLostError if the check inside fails, ServerStalledError after the limit; a full server is fine."""
    try:
        async with asyncio.timeout(limit_s):
            yield
    except ServerFullError:
        return
    except httpx.HTTPError as error:
        raise lost(error) from error
    except TimeoutError:
        raise ServerStalledError(f"gave no answer to a probe in {limit_s:g} s") from None
    except DraftsmithError as error:
        raise RequestLostError(str(error)) from error


async def post(client: httpx.AsyncClient, url: str, name: str, payload: Json) -> Json:
    """Send a request and return the body of the answer. name: the request's, for errors."""
    response = await client.post(url, json=payload)
    check_status(name, url, response.status_code, response.text, response.headers.get("Retry-After"))
    return dict(response.json())


async def read_stream(
    client: httpx.AsyncClient, url: str, name: str, payload: Json, receive: Callable[[Json], None]
) -> None:
    """Send a request with a streamed answer. receive: called with each of its events."""
    async with client.stream("POST", url, json=payload) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            check_status(name, url, response.status_code, text, response.headers.get("Retry-After"))
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue  # blank, or the closing [DONE]
            event = json.loads(line.removeprefix("data: "))
            if error := event.get("error"):
                check_status(name, url, int(error.get("code") or 500), str(error.get("message")))
            receive(event)


def lost(error: httpx.HTTPError) -> RequestLostError:
    """Return the error of a request that got no answer over HTTP."""
    return RequestLostError(f"{type(error).__name__} {error}".rstrip())


def key_header(api_key: str | None) -> dict[str, str]:
    """Return the header that carries the server's API key."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def check_status(name: str, url: str, status: int, text: str, retry_after: str | None = None) -> None:
    """Raise RequestLostError for a status that may change, DraftsmithError for a refusal.

    name: the request's. text: the answer's. retry_after: the header of that name.
    """
    if status == 200:
        return
    what = f"status {status}: {' '.join(text.split())[:300]}"
    seconds = (retry_after or "").strip()
    full = retry_after is not None or any(words in what.lower() for words in _FULL_503)
    if status == 429 or (status == 503 and full):
        raise ServerFullError(f"answered with {what}", float(seconds) if seconds.isdigit() else 0.0)
    if status >= 500 or status in _TRANSIENT_4XX:
        raise RequestLostError(f"answered with {what}")
    if status in _UNAUTHORIZED:
        raise DraftsmithError(
            f"request {name}: {url} refuses it with {what}. Name the environment variable that holds its API key in "
            "engine.api_key_env; other commands send SGLANG_API_KEY or VLLM_API_KEY, to servers that --url or "
            "registry.servers names."
        )
    raise RefusedRequestError(f"request {name}: {url} refuses it with {what}")
