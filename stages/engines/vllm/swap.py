"""Writes a drafter into a running vLLM server by vLLM's own update of draft weights (`plugin_swap.py` is its backend).

vLLM writes between two steps, so nothing has to be paused. The version of the weights, a text that vLLM keeps, is the
JSON of {"drafter": digest, "since", "before": digest, "pause_s", "proof"}. It is set before the weights are written,
without a proof: after a command that was killed the next one writes them again.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.servers.client import Json, query
from draftsmith.stages.engines.servers.state import NewDrafter
from draftsmith.stages.engines.vllm.served import read_version

_WRITE_TIMEOUT_S = 300.0  # a write reads the files, after the step that is computed


async def write_drafter(client: httpx.AsyncClient, url: str, new: NewDrafter, proof: str, started_with: str) -> Json:
    """Make a server serve a drafter and empty its prefix cache, or record the proof of a drafter that was written.

    started_with: digest of the drafter that the server was started with. Raises DraftsmithError if the server refuses
    it, RequestLostError if it does not answer.
    """
    old = await read_version(client, url)
    if proof:
        await _set_version(client, url, {**old, "proof": proof})
        return old
    served = old.get("drafter", started_with)
    before = old["before"] if old and served == new.digest else served
    version: Json = {"drafter": new.digest, "since": "", "before": before, "pause_s": 0.0, "proof": ""}
    await _set_version(client, url, version)
    try:
        await _start(client, url)
        started = time.monotonic()
        folder = "" if new.folder == Path() else str(new.folder.absolute())
        files = {"drafter": new.digest, "folder": folder, "upload": new.upload, "tracking": new.tracking}
        await _post(client, url, "update_weights", {"update_info": files})
    except DraftsmithError:
        await _set_version(client, url, old)
        raise
    version |= {"since": datetime.now(UTC).isoformat(timespec="seconds"), "pause_s": time.monotonic() - started}
    await _post(client, url, "finish_weight_update", {"weight_version": json.dumps(version)})
    # which has keys and values of the old drafter; requests in flight lose no token, their prompts are prefilled again
    await _post(client, url, "reset_prefix_cache?reset_running_requests=true")
    return version


async def _start(client: httpx.AsyncClient, url: str) -> None:
    try:
        await _post(client, url, "start_draft_weight_update")
    except DraftsmithError as error:
        if "already active" not in str(error):
            raise
        await _post(client, url, "finish_weight_update")  # of a command that was killed
        await _post(client, url, "start_draft_weight_update")


async def _set_version(client: httpx.AsyncClient, url: str, version: Json) -> None:
    await _post(client, url, "update_weight_version", {"new_version": json.dumps(version)})


async def _post(client: httpx.AsyncClient, url: str, name: str, body: Json | None = None) -> None:
    async with httpx.AsyncClient(headers=client.headers) as fresh:  # vLLM closes the connection of an error
        response = await query(fresh, "POST", f"{url}/{name}", body, _WRITE_TIMEOUT_S)
    if response.status_code != 200:
        said = " ".join(response.text.split())[:300]
        raise DraftsmithError(f"{url}: refuses the drafter: /{name} gives {said}. Look at the server's log.")
