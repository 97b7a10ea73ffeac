"""What a vLLM server reports of its drafter and of its verify steps.

A server in vLLM's development mode also reports its options, and the version of its weights (`swap.py`).
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import httpx

from draftsmith.stages.drafters.digest import served_digest
from draftsmith.stages.engines.servers.client import Json, get_json, query
from draftsmith.stages.engines.servers.state import Finished, ServerState, sums
from draftsmith.stages.engines.vllm.plugin import BACKEND

_STEPS, _ACCEPTED = (f"vllm:spec_decode_num_{name}_total" for name in ("drafts", "accepted_tokens"))
_COUNTERS = ["vllm:request_success_total", _STEPS, _ACCEPTED]
_POSITION = re.compile(r'^vllm:spec_decode_num_accepted_tokens_per_pos_total\{.*position="(\d+)"', re.MULTILINE)


def is_vllm(metrics: str) -> bool:
    """Return whether metrics are those of a vLLM server."""
    return "\nvllm:" in metrics


def finished(metrics: str) -> Finished:
    """Return what a server finished since its start; steps of unfinished requests are counted too.

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
    state = replace(
        state,
        dtype=str(config["model_config"]["dtype"]).removeprefix("torch."),
        algorithm=str(speculative["method"]).upper(),
        started_with=str(speculative["model"]),
    )
    if (config["weight_transfer_config"] or {}).get("backend") != BACKEND:
        return state
    served = await read_version(client, url)
    if not served:
        folder = Path(state.started_with)
        return replace(state, digest=served_digest(folder) if folder.is_dir() else "")
    return replace(
        state,
        digest=served["drafter"],
        since=served["since"] or state.since,
        before=served["before"],
        pause_s=served["pause_s"],
        proof=served["proof"],
    )


async def read_version(client: httpx.AsyncClient, url: str) -> Json:
    """Return the version of the weights as the last swap recorded it; empty before the first one."""
    text = (await get_json(client, url, "weight_info"))["weight_version"]
    return dict(json.loads(text)) if text.startswith("{") else {}
