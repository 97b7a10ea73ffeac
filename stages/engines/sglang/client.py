"""What is sent to a server, and what its answer means: done, full, lost, or refused."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError, RetryableError

if TYPE_CHECKING:
    import httpx

_HEALTH_TIMEOUT_S = 30.0  # SGLang answers within 20, yes or no
_CONNECT_TIMEOUT_S = 10.0
_PROBE_TIMEOUT_S = 60.0
_FULL_503 = ("queue", "waiting timeout", "higher priority")  # SGLang's own words where its queue is full
_MAY_PASS = frozenset({408, 425})  # of a router's queue
_KEY_ASKED_FOR = frozenset({401, 403})
_QUESTION_TIMEOUT_S = 120.0  # of the handshake: a first generation may compile kernels
_ONE_PIECE = 1 << 30  # as stream_interval: the first token at once, all others together


@dataclass(frozen=True)
class Answer:
    """The body of a finished /generate, and its times as the client saw them."""

    body: dict[str, Any]
    seconds: float
    first_token_seconds: float = float("nan")
    url: str = ""  # of the server


class LostError(Exception):
    """An attempt failed that may succeed when repeated: no connection, a 5xx answer, an abort by the server."""


class FullError(LostError):
    """The server takes no request at the moment. wait_s: for how long, if it said so."""

    def __init__(self, what: str, wait_s: float = 0.0):
        super().__init__(what)
        self.wait_s = wait_s


class SilentError(LostError):
    """The server is there, but computes nothing at the moment."""


class RefusedRequestError(DraftsmithError):
    """The server does not take this request, and would not take it the next time."""


async def generate(
    client: httpx.AsyncClient, url: str, name: str, payload: dict[str, Any], *, stream: bool = False
) -> Answer:
    """Send one POST /generate. Raises LostError, or DraftsmithError if the server refuses the request."""
    import httpx

    started = time.perf_counter()
    first_token: float | None = None
    body: dict[str, Any] = {}
    try:
        if not stream:
            response = await client.post(f"{url}/generate", json=payload)
            check_status(name, url, response.status_code, response.text, response.headers.get("Retry-After"))
            body = response.json()
        else:
            sampling = {**payload["sampling_params"], "stream_interval": _ONE_PIECE}
            payload = {**payload, "sampling_params": sampling, "stream": True}
            async with client.stream("POST", f"{url}/generate", json=payload) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    check_status(name, url, response.status_code, text, response.headers.get("Retry-After"))
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue  # blank, or the closing [DONE]
                    body = json.loads(line.removeprefix("data: "))
                    if error := body.get("error"):
                        check_status(name, url, int(error.get("code") or 500), str(error.get("message")))
                    if first_token is None and body.get("output_ids"):
                        first_token = time.perf_counter() - started
        reason = body["meta_info"]["finish_reason"]
        kind = reason["type"]
    except httpx.HTTPError as error:
        raise _no_answer(error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise LostError(f"gave an answer that cannot be read ({type(error).__name__}: {error})") from error
    if kind == "abort":
        check_status(name, url, int(reason.get("status_code") or 500), f"aborted: {reason.get('message')}")
    seconds = time.perf_counter() - started
    return Answer(body, seconds, float("nan") if first_token is None else first_token, url)


async def get(client: httpx.AsyncClient, url: str, *names: str) -> dict[str, Any]:
    """Return what the first of several endpoints says that is there: their names differ between releases."""
    for name in names:
        response = await send(client, "GET", f"{url}/{name}")
        if response.status_code != 404:
            check_status(name, url, response.status_code, response.text)
            return json_object(response)
    raise wrong(url, f"has no /{names[0]}: is it a SGLang server of a supported release?")


async def post(client: httpx.AsyncClient, url: str, name: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a short generation."""
    response = await send(client, "POST", f"{url}/generate", payload)
    check_status(name, url, response.status_code, response.text)
    return json_object(response)


async def send(client: httpx.AsyncClient, method: str, url: str, body: dict[str, Any] | None = None) -> httpx.Response:
    """Return the answer to a question of the handshake. Raises LostError if none comes."""
    import httpx

    try:
        return await client.request(method, url, json=body, timeout=_QUESTION_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise LostError(f"cannot be reached ({type(error).__name__} {error})") from error


def json_object(response: httpx.Response) -> dict[str, Any]:
    """Return the body of an answer. Raises DraftsmithError if it is no JSON object."""
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DraftsmithError(f"engine: {response.url} gives no JSON object: is it a SGLang server?")
    return found


def away(url: str, error: LostError) -> RetryableError:
    """Return the error of a server that does not answer."""
    return RetryableError(f"engine: {url} {error}; see that the server runs, then run the same command")


def wrong(url: str, what: str) -> DraftsmithError:
    """Return the error of a server that is not what the config asks for."""
    return DraftsmithError(f"engine: the server {url} {what}")


async def probe(client: httpx.AsyncClient, url: str) -> None:
    """Ask whether the server still computes. Raises LostError if not, SilentError if it is there and computes nothing.

    GET /health_generate answers 200 as soon as the scheduler has returned anything for anybody, and 503 after 20 s
    without. Where there is no such endpoint it is a short generation.
    """
    import httpx

    name, limit = "of the health check", httpx.Timeout(_HEALTH_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
    payload = {"input_ids": [0], "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
    try:
        response = await client.get(f"{url}/health_generate", timeout=limit)
        if response.status_code == 501 or 400 <= response.status_code < 500:  # of a gateway that does not pass it on
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                await generate(client, url, name, payload)
        elif response.status_code == 503:
            raise SilentError("computes nothing")
        else:
            check_status(name, url, response.status_code, response.text)
    except FullError:
        return
    except httpx.HTTPError as error:
        raise _no_answer(error) from error
    except TimeoutError:
        raise SilentError(f"gave no answer to a probe in {_PROBE_TIMEOUT_S:g} s") from None
    except DraftsmithError as error:
        raise LostError(str(error)) from error


def _no_answer(error: httpx.HTTPError) -> LostError:
    return LostError(f"{type(error).__name__} {error}".rstrip())


def key_header(api_key: str | None) -> dict[str, str]:
    """Return the header by which a request shows the server's API key."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def check_status(name: str, url: str, status: int, text: str, retry_after: str | None = None) -> None:
    """Raise LostError for an answer that may be another next time, DraftsmithError for one that says no.

    retry_after: the header of that name.
    """
    if status == 200:
        return
    what = _what(status, text)
    later = retry_after is not None or any(words in what.lower() for words in _FULL_503)
    if status == 429 or (status == 503 and later):
        raise FullError(f"answered with {what}", _seconds(retry_after))
    if status >= 500 or status in _MAY_PASS:
        raise LostError(f"answered with {what}")
    if status in _KEY_ASKED_FOR:
        raise DraftsmithError(
            f"request {name}: {url} refuses it with {what}: name the variable of the environment that holds its API "
            "key in engine.api_key_env"
        )
    raise RefusedRequestError(f"request {name}: {url} refuses it with {what}")


def _what(status: int, text: str) -> str:
    return f"status {status}: {' '.join(text.split())[:300]}"


def _seconds(retry_after: str | None) -> float:
    """Read the header Retry-After, which is a number of seconds or a date; 0 if it says nothing."""
    try:
        if (given := (retry_after or "").strip()).isdigit():
            return float(given)
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
