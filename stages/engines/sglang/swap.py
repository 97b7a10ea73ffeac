"""Writes a drafter into a running SGLang server; our plug-in there does it (`plugin_swap.py`)."""

from __future__ import annotations

import asyncio
import json
import time
from http import HTTPStatus

import httpx

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.servers.client import Json, check_status, json_object, query
from draftsmith.stages.engines.servers.state import NewDrafter
from draftsmith.stages.engines.sglang.protocol import SWAP_ACTION

_WRITE_TIMEOUT_S = 300.0  # a write waits for the step that is computed
_READ_LIMIT_S = 1800.0  # until a server has read the files
_POLL_S = 0.5


async def write_drafter(client: httpx.AsyncClient, url: str, new: NewDrafter, proof: str) -> Json:
    """Make a server serve a drafter, and record the proof of it. The plug-in takes the same request again."""
    wanted = {
        "drafter": new.digest,
        "folder": str(new.folder.absolute()),
        "upload": new.upload,
        "tracking": new.tracking,
        "proof": proof,
    }
    deadline = time.monotonic() + _READ_LIMIT_S
    while time.monotonic() < deadline:
        body = {"action": SWAP_ACTION + json.dumps(wanted)}
        response = await query(client, "POST", f"{url}/weights_checker", body, _WRITE_TIMEOUT_S)
        if response.status_code == HTTPStatus.BAD_REQUEST:
            raise DraftsmithError(f"{url}: refuses the drafter: {json_object(response).get('message')}.")
        check_status("of a swap", url, response.status_code, response.text)
        # as SGLang joins the messages of replicas
        replicas = [json.loads(part) for part in json_object(response)["message"].split(" | ")]
        if all(each["state"] == "served" for each in replicas):
            return {name: max(each[name] for each in replicas) for name in ("since", "pause_s")}
        await asyncio.sleep(_POLL_S)
    raise RetryableError(f"{url}: did not read the drafter in {_READ_LIMIT_S:.0f} s. Look at its log.")
