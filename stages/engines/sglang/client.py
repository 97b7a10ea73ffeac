"""HTTP requests to one server, and the outcome of each: an answer, or an error that says whether to try again."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.sglang.protocol import Json

_HEALTH_TIMEOUT_S = 30.0  # SGLang answers within 20
_CONNECT_TIMEOUT_S = 10.0
_HEALTH_GENERATION_TIMEOUT_S = 60.0
_FULL_503 = ("queue", "waiting timeout", "higher priority")  # in SGLang's texts when its queue is full
_TRANSIENT_4XX = frozenset({408, 425})  # of a router's queue
_UNAUTHORIZED = frozenset({401, 403})
_QUERY_TIMEOUT_S = 120.0  # of the handshake: a first generation may compile kernels
_STREAM_INTERVAL = 1 << 30  # the first token alone, then all others in one piece


@dataclass(frozen=True)
class ServerAnswer:
    """The body of a finished /generate, and its times as the client measured them."""

    body: Json
    seconds: float = 0.0
    first_token_seconds: float = float("nan")
    url: str = ""  # of the server


class RequestLostError(Exception):
    """An attempt failed that may succeed when repeated: no connection, a 5xx answer, an abort by the server."""


class ServerFullError(RequestLostError):
    """The server takes no request at the moment. wait_s: for how long, if it reported so."""

    def __init__(self, reason: str, wait_s: float = 0.0):
        super().__init__(reason)
        self.wait_s = wait_s


class ServerStalledError(RequestLostError):
    """The server is up, but computes nothing at the moment."""


class RefusedRequestError(DraftsmithError):
    """The server refuses this request, and would refuse it the next time."""


async def generate(
    client: httpx.AsyncClient, url: str, name: str, payload: Json, *, stream: bool = False
) -> ServerAnswer:
    """Send one POST /generate. Raises RequestLostError, or DraftsmithError if the server refuses the request."""
    started = time.perf_counter()
    first_token: float | None = None
    body: Json = {}
    try:
        if not stream:
            response = await client.post(f"{url}/generate", json=payload)
            check_status(name, url, response.status_code, response.text, response.headers.get("Retry-After"))
            body = response.json()
        else:
            sampling = {**payload["sampling_params"], "stream_interval": _STREAM_INTERVAL}
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
        raise _lost(error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise RequestLostError(f"gave an answer that cannot be read ({type(error).__name__}: {error})") from error
    if kind == "abort":
        check_status(name, url, int(reason.get("status_code") or 500), f"aborted: {reason.get('message')}")
    seconds = time.perf_counter() - started
    return ServerAnswer(body, seconds, float("nan") if first_token is None else first_token, url)


async def get_json(client: httpx.AsyncClient, url: str, *names: str) -> Json:
    """Return the body of the first of several endpoints that exists: their names differ between releases."""
    for name in names:
        response = await query(client, "GET", f"{url}/{name}")
        if response.status_code != 404:
            check_status(name, url, response.status_code, response.text)
            return json_object(response)
    raise wrong_server(url, f"has no /{names[0]}. Give the address of a SGLang server of a supported release.")


async def query(client: httpx.AsyncClient, method: str, url: str, body: Json | None = None) -> httpx.Response:
    """Send a request of the handshake and return the answer. Raises RequestLostError if none comes."""
    try:
        return await client.request(method, url, json=body, timeout=_QUERY_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise RequestLostError(f"cannot be reached ({type(error).__name__} {error})") from error


def json_object(response: httpx.Response) -> Json:
    """Return the body of an answer. Raises DraftsmithError if it is no JSON object."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise DraftsmithError(f"engine: {response.url} gives no JSON object. Give the address of a SGLang server.")
    return body


def unreachable_server(url: str, error: RequestLostError) -> RetryableError:
    """Return the error of a server that does not answer."""
    return RetryableError(f"engine: {url} {error}. Check that the server runs, then run the same command.")


def wrong_server(url: str, reason: str) -> DraftsmithError:
    """Return the error of a server that does not fit the config. reason: cause and remedy, without a subject."""
    return DraftsmithError(f"engine: the server {url} {reason}")


async def check_health(client: httpx.AsyncClient, url: str) -> None:
    """Check that the server computes. Raises RequestLostError if not, ServerStalledError if it is up but stalled.

    GET /health_generate answers 200 as soon as the scheduler has returned anything to anybody, and 503 after 20 s
    without. Where there is no such endpoint, a short generation is sent.
    """
    name, limit = "of the health check", httpx.Timeout(_HEALTH_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
    payload = {"input_ids": [0], "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
    try:
        response = await client.get(f"{url}/health_generate", timeout=limit)
        if response.status_code == 501 or 400 <= response.status_code < 500:  # a gateway that does not pass it on
            async with asyncio.timeout(_HEALTH_GENERATION_TIMEOUT_S):
                await generate(client, url, name, payload)
        elif response.status_code == 503:
            raise ServerStalledError("computes nothing")
        else:
            check_status(name, url, response.status_code, response.text)
    except ServerFullError:
        return
    except httpx.HTTPError as error:
        raise _lost(error) from error
    except TimeoutError:
        raise ServerStalledError(f"gave no answer to a probe in {_HEALTH_GENERATION_TIMEOUT_S:g} s") from None
    except DraftsmithError as error:
        raise RequestLostError(str(error)) from error


def _lost(error: httpx.HTTPError) -> RequestLostError:
    return RequestLostError(f"{type(error).__name__} {error}".rstrip())


def key_header(api_key: str | None) -> dict[str, str]:
    """Return the header that carries the server's API key."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def check_status(name: str, url: str, status: int, text: str, retry_after: str | None = None) -> None:
    """Raise RequestLostError for a status that may change, DraftsmithError for a refusal.

    name: of the request. text: of the answer. retry_after: the header of that name.
    """
    if status == 200:
        return
    what = f"status {status}: {' '.join(text.split())[:300]}"
    full = retry_after is not None or any(words in what.lower() for words in _FULL_503)
    if status == 429 or (status == 503 and full):
        raise ServerFullError(f"answered with {what}", _retry_after_s(retry_after))
    if status >= 500 or status in _TRANSIENT_4XX:
        raise RequestLostError(f"answered with {what}")
    if status in _UNAUTHORIZED:
        raise DraftsmithError(
            f"request {name}: {url} refuses it with {what}. Name the environment variable that holds its API key in "
            "engine.api_key_env."
        )
    raise RefusedRequestError(f"request {name}: {url} refuses it with {what}")


def _retry_after_s(header: str | None) -> float:
    """Return the seconds of a Retry-After header, which is a number of seconds or a date; 0 if it has neither."""
    try:
        if (given := (header or "").strip()).isdigit():
            return float(given)
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
