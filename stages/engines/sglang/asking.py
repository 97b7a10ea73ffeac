"""Questions to a server before it gets any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.sglang.client import LostError, check_status
from draftsmith.stages.engines.sglang.records import generate_payload

if TYPE_CHECKING:
    import httpx

_TIMEOUT_S = 120.0  # a first generation may compile kernels


async def get(client: httpx.AsyncClient, url: str, *names: str) -> dict[str, Any]:
    """The first of several endpoints (their names differ between releases) that is there."""
    for name in names:
        response = await send(client, "GET", f"{url}/{name}")
        if response.status_code != 404:
            check_status(name, url, response.status_code, response.text)
            return json_object(response)
    raise wrong(url, f"has no /{names[0]}: is it a SGLang server of a supported release?")


async def send(client: httpx.AsyncClient, method: str, url: str, body: dict[str, Any] | None = None) -> httpx.Response:
    """Raises LostError if no answer comes."""
    import httpx

    try:
        return await client.request(method, url, json=body, timeout=_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise LostError(f"cannot be reached ({type(error).__name__} {error})") from error


async def generate(client: httpx.AsyncClient, url: str, request: Request, *, traced: bool = False) -> dict[str, Any]:
    """The answer to a request, which no token ends before its `max_new_tokens`."""
    payload = generate_payload(request, (), traced)
    payload["sampling_params"]["ignore_eos"] = True
    response = await send(client, "POST", f"{url}/generate", payload)
    check_status(request.request_id, url, response.status_code, response.text)
    return json_object(response)


def json_object(response: httpx.Response) -> dict[str, Any]:
    """Raises DraftsmithError if it is none."""
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DraftsmithError(f"engine: {response.url} gives no JSON object: is it a SGLang server?")
    return found


def wrong(url: str, what: str) -> DraftsmithError:
    """A server that is not what the config asks for."""
    return DraftsmithError(f"engine: the server {url} {what}")
