"""Reports of a vLLM server about its drafter and verify steps, and the writing of another drafter into it.

A server in vLLM's development mode also reports its options and the version of its weights, and takes other weights by
vLLM's update of draft weights (`plugin_swap.py` is its backend). vLLM writes between two steps, so nothing has to
be paused. The version of the weights, a text that vLLM keeps, is the JSON of a `SwapReport`. It is set before the
weights are written, with an empty `since`: after a command that was killed the next one writes them again.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import httpx

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.digest import served_digest
from draftsmith.stages.engines.servers.http import Json, get_json, query
from draftsmith.stages.engines.servers.state import (
    STATE_VERSION,
    Finished,
    NewDrafter,
    ServerState,
    read_report,
    sums,
)
from draftsmith.stages.engines.vllm.plugin import BACKEND

_STEPS, _ACCEPTED = (f"vllm:spec_decode_num_{name}_total" for name in ("drafts", "accepted_tokens"))
_COUNTERS = ["vllm:request_success_total", _STEPS, _ACCEPTED]
_POSITION = re.compile(r'^vllm:spec_decode_num_accepted_tokens_per_pos_total\{.*position="(\d+)"', re.MULTILINE)


def is_vllm(metrics: str) -> bool:
    """Return whether metrics are those of a vLLM server."""
    return "\nvllm:" in metrics


def finished(metrics: str) -> Finished:
    """Return the requests that a server finished since its start; steps of unfinished requests count too.

    An answer's last step counts whole, though it may commit tokens after the answer's end.
    """
    requests, steps, accepted = sums(metrics, _COUNTERS)
    return Finished(requests, steps + accepted, steps)


async def server_state(client: httpx.AsyncClient, url: str, metrics: str) -> ServerState:
    """Return the state of a server. Raises RequestLostError if it does not answer."""
    version = str((await get_json(client, url, "version")).get("version", "?"))
    if _STEPS not in metrics:
        return ServerState(url, "vllm", version)
    (started,), total = sums(metrics, ["process_start_time_seconds"]), finished(metrics)
    state = ServerState(
        url,
        "vllm",
        version,
        algorithm="a drafter",
        block_size=len(set(_POSITION.findall(metrics))) + 1,
        tau=total.committed / total.steps if total.steps else None,
        since=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds") if started else None,
    )
    if (await query(client, "GET", f"{url}/weight_info")).status_code != 200:
        return state  # not in development mode
    config = (await get_json(client, url, "server_info?config_format=json"))["vllm_config"]
    speculative = config["speculative_config"]
    method, drafter = str(speculative["method"]), speculative["model"]
    state = replace(
        state,
        dtype=str(config["model_config"]["dtype"]).removeprefix("torch."),
        algorithm="NEXTN" if method == "mtp" else method.upper(),
        started_with=str(drafter),
        own_head=method == "mtp" and drafter in (None, config["model_config"]["model"]),
    )
    if (config["weight_transfer_config"] or {}).get("backend") != BACKEND:
        return state
    text = await _version(client, url)
    if not text.startswith("{"):  # no swap yet
        folder = Path(state.started_with)
        return replace(state, digest=served_digest(folder) if folder.is_dir() and not state.own_head else "")
    report = read_report(url, json.loads(text))
    return replace(
        state,
        digest=report.drafter,
        since=report.since or state.since,
        before=report.before,
        pause_s=report.pause_s,
    )


async def _version(client: httpx.AsyncClient, url: str) -> str:
    """Return the version of the weights."""
    return str((await get_json(client, url, "weight_info"))["weight_version"])


_WRITE_TIMEOUT_S = 300.0  # a write reads the files, after the running step


async def write_drafter(client: httpx.AsyncClient, url: str, new: NewDrafter, served: ServerState) -> Json:
    """Make a server serve a drafter and empty its prefix cache.

    served: its state before. Raises DraftsmithError if the server refuses it, RequestLostError if it does not
    answer.
    """
    old = await _version(client, url)
    report: Json = {"v": STATE_VERSION, "drafter": new.digest, "since": "", "before": served.digest, "pause_s": 0.0}
    await _set_version(client, url, json.dumps(report))
    try:
        await _start(client, url)
        started = time.monotonic()
        files = {"drafter": new.digest, "folder": str(new.folder.absolute()), "upload": new.upload}
        await _post(client, url, "update_weights", {"update_info": {**files, "served": served.digest}})
    except DraftsmithError:
        await _set_version(client, url, old)
        raise
    report |= {"since": datetime.now(UTC).isoformat(timespec="seconds"), "pause_s": time.monotonic() - started}
    await _post(client, url, "finish_weight_update", {"weight_version": json.dumps(report)})
    # the cache has keys and values of the old drafter; requests in flight lose no token and are prefilled again
    await _post(client, url, "reset_prefix_cache?reset_running_requests=true")
    return report


async def _start(client: httpx.AsyncClient, url: str) -> None:
    try:
        await _post(client, url, "start_draft_weight_update")
    except DraftsmithError as error:
        if "already active" not in str(error):
            raise
        await _post(client, url, "finish_weight_update")  # left by a command that was killed
        await _post(client, url, "start_draft_weight_update")


async def _set_version(client: httpx.AsyncClient, url: str, version: str) -> None:
    await _post(client, url, "update_weight_version", {"new_version": version})


async def _post(client: httpx.AsyncClient, url: str, name: str, body: Json | None = None) -> None:
    async with httpx.AsyncClient(headers=client.headers) as fresh:  # vLLM closes the connection of an error
        response = await query(fresh, "POST", f"{url}/{name}", body, _WRITE_TIMEOUT_S)
    if response.status_code != 200:
        said = " ".join(response.text.split())[:300]
        raise DraftsmithError(f"{url}: refuses the drafter: /{name} gives {said}. Look at the server's log.")
