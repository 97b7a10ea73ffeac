"""What a SGLang server reports of its drafter and of finished requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import httpx

from draftsmith.stages.engines.servers.client import get_json
from draftsmith.stages.engines.servers.state import Finished, ServerState, TracedRequest, sums
from draftsmith.stages.engines.sglang.protocol import REQUESTS_STATE, SWAP_STATE, Json

_COUNTERS = [f"sglang:{name}_total" for name in ("num_requests", "generation_tokens", "spec_verify_calls")]


async def server_state(client: httpx.AsyncClient, url: str) -> ServerState:
    """Return the state of a server. Raises RequestLostError if it does not answer."""
    server = await get_json(client, url, "server_info", "get_server_info")
    states = server.get("internal_states") or ()  # of each replica
    taus = [tau for state in states if (tau := state.get("avg_spec_accept_length"))]
    reported = ServerState(
        url,
        "sglang",
        version=str(server.get("version")),
        dtype=str(server.get("dtype")),
        algorithm=server.get("speculative_algorithm") or None,
        block_size=int(server.get("speculative_num_draft_tokens") or 0),
        tau=sum(taus) / len(taus) if taus else None,
        started_with=str(server.get("speculative_draft_model_path")),
    )
    reports = [state.get(SWAP_STATE) for state in states]
    if not reports or not all(reports):
        return reported
    return replace(
        reported,
        digest=", ".join(sorted({report["drafter"] for report in reports})),  # several after an interrupted swap
        since=max(report["since"] for report in reports),
        before=reports[0]["before"],
        pause_s=max(report["pause_s"] for report in reports),
        proof=min(report["proof"] for report in reports),  # empty if one has none
        traced=_traced(states),
    )


def _traced(states: Sequence[Json]) -> Mapping[str, Sequence[TracedRequest]] | None:
    """Return the traced requests of all replicas by drafter; None if one traces none."""
    traced: dict[str, list[TracedRequest]] = {}
    for state in states:
        if REQUESTS_STATE not in state:
            return None
        for drafter, requests in state[REQUESTS_STATE].items():
            traced.setdefault(drafter, []).extend(TracedRequest(*request) for request in requests)
    return traced


def finished(metrics: str) -> Finished:
    """Return what a server finished since its start, by its metrics."""
    requests, tokens, steps = sums(metrics, _COUNTERS)
    return Finished(requests, tokens - requests, steps)
