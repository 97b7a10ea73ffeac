"""Reports of a SGLang server about its drafter and finished requests, and the writing of another drafter into it.

Our plug-in there does the writing (`plugin_swap.py`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus

import httpx

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.servers.http import check_status, get_json, json_object, query
from draftsmith.stages.engines.servers.state import (
    Finished,
    NewDrafter,
    ServerState,
    TracedRequest,
    read_report,
    sums,
)
from draftsmith.stages.engines.sglang.protocol import NATIVE, REQUESTS_STATE, SWAP_ACTION, SWAP_STATE, Json

_COUNTERS = [f"sglang:{name}_total" for name in ("num_requests", "generation_tokens", "spec_verify_calls")]


async def server_state(client: httpx.AsyncClient, url: str) -> ServerState:
    """Return the state of a server. Raises RequestLostError if it does not answer."""
    server = await get_json(client, url, "server_info")
    states = server.get("internal_states") or ()  # one per replica
    algorithm, drafter = server.get("speculative_algorithm") or None, server.get("speculative_draft_model_path")
    taus = [tau for state in states if (tau := state.get("avg_spec_accept_length"))]
    reported = ServerState(
        url,
        "sglang",
        version=str(server.get("version")),
        dtype=str(server.get("dtype")),
        algorithm=NATIVE.get(str(algorithm), algorithm),
        block_size=int(server.get("speculative_num_draft_tokens") or 0),
        tau=sum(taus) / len(taus) if taus else None,
        started_with=str(drafter),
        own_head=algorithm in NATIVE and drafter in (None, server.get("model_path")),
    )
    if not states or not all(SWAP_STATE in state for state in states):
        return reported
    reports = [read_report(url, state[SWAP_STATE]) for state in states]
    return replace(
        reported,
        digest=", ".join(sorted({report.drafter for report in reports})),  # several after an interrupted swap
        since=max(report.since for report in reports),
        before=reports[0].before,
        pause_s=max(report.pause_s for report in reports),
        traced=_traced(states),
    )


def _traced(states: Sequence[Json]) -> Mapping[str, Sequence[TracedRequest]] | None:
    """Return the traced requests of all replicas by drafter; None if one traces none."""
    traced: dict[str, list[TracedRequest]] = {}
    for state in states:
        if REQUESTS_STATE not in state:
            return None
        for drafter, requests in state[REQUESTS_STATE].items():
            traced.setdefault(drafter, []).extend(TracedRequest(*request[:2]) for request in requests)
    return traced


def finished(metrics: str) -> Finished:
    """Return the requests that a server finished since its start, by its metrics."""
    requests, tokens, steps = sums(metrics, _COUNTERS)
    return Finished(requests, tokens - requests, steps)


_WRITE_TIMEOUT_S = 300.0  # a write waits for the running step
_READ_LIMIT_S = 1800.0  # until a server has read the files
_POLL_S = 0.5


async def write_drafter(client: httpx.AsyncClient, url: str, new: NewDrafter) -> Json:
    """Make a server serve a drafter. The plug-in takes the same request again."""
    order = {"drafter": new.digest, "folder": str(new.folder.absolute()), "upload": new.upload}
    deadline = time.monotonic() + _READ_LIMIT_S
    while time.monotonic() < deadline:
        body = {"action": SWAP_ACTION + json.dumps(order)}
        response = await query(client, "POST", f"{url}/weights_checker", body, _WRITE_TIMEOUT_S)
        if response.status_code == HTTPStatus.BAD_REQUEST:
            raise DraftsmithError(f"{url}: refuses the drafter: {json_object(response).get('message')}.")
        check_status("of a swap", url, response.status_code, response.text)
        # as SGLang joins the messages of replicas
        replicas = [json.loads(part) for part in json_object(response)["message"].split(" | ")]
        if all(replica["state"] == "served" for replica in replicas):
            return {name: max(replica[name] for replica in replicas) for name in ("since", "pause_s")}
        await asyncio.sleep(_POLL_S)
    raise RetryableError(f"{url}: did not read the drafter in {_READ_LIMIT_S:.0f} s. Look at its log.")
