"""Asks running servers what they serve: the drafter, and tau by SGLang's own metrics."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import httpx
import numpy as np

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.stages.engines.servers.client import (
    RequestLostError,
    check_status,
    get_json,
    key_header,
    query,
    unreachable_server,
    wrong_server,
)
from draftsmith.stages.engines.sglang.protocol import SWAP_STATE
from draftsmith.stages.runtime.statistics import jackknife, ratio

API_KEY = "SGLANG_API_KEY"  # environment variable with the servers' key, if they require one
_TOKENS, _REQUESTS, _STEPS = (
    f"sglang:{name}_total" for name in ("generation_tokens", "num_requests", "spec_verify_calls")
)
_SAMPLE = re.compile(rf"^({_TOKENS}|{_REQUESTS}|{_STEPS})(?:{{.*}})? (\S+)", re.MULTILINE)
_WINDOWS = 30  # in the time that servers are watched
_T = TypeVar("_T")


@dataclass(frozen=True)
class ServerState:
    """What a server reports of its drafter."""

    url: str
    version: str = ""
    dtype: str = ""
    algorithm: str | None = None  # None: it serves without a drafter
    block_size: int = 0  # tokens of a verify step
    tau: float | None = None  # of all verify steps since its start, whatever drafter made them
    started_with: str = ""  # folder or hub id of the drafter in its options
    # of the plug-in
    digest: str | None = None  # of the drafter; None: no plug-in that can write another one
    since: str | None = None  # when it began to serve that drafter, ISO 8601, UTC
    before: str = ""  # digest of the drafter before the last swap
    pause_s: float = 0.0  # of the last swap
    proof: str = ""  # of the last swap


@dataclass(frozen=True)
class Finished:
    """The requests that a server finished in one window."""

    requests: float
    committed: float  # tokens, by verify steps; a request's first token comes from its prefill
    steps: float


def ask_servers(urls: Sequence[str]) -> dict[str, ServerState | DraftsmithError]:
    """Return the state of each server, or why it is unknown: a RetryableError if the server does not answer."""
    return from_servers(urls, _state)


def count_finished(urls: Sequence[str], seconds: float) -> dict[str, list[Finished] | DraftsmithError]:
    """Return what each server finishes in each window of the next seconds, or why that is unknown.

    Windows without a verify step are left out.
    """
    return from_servers(urls, lambda client, url: _windows(client, url, seconds))


def from_servers(
    urls: Sequence[str], ask: Callable[[httpx.AsyncClient, str], Awaitable[_T]]
) -> dict[str, _T | DraftsmithError]:
    """Return what `ask` returns of each server, or its error: a RetryableError if the server does not answer."""
    return asyncio.run(_from_servers(urls, ask))


async def _from_servers(
    urls: Sequence[str], ask: Callable[[httpx.AsyncClient, str], Awaitable[_T]]
) -> dict[str, _T | DraftsmithError]:
    async def answer(client: httpx.AsyncClient, url: str) -> _T | DraftsmithError:
        try:
            return await ask(client, url)
        except RequestLostError as error:
            return unreachable_server(url, error)
        except DraftsmithError as error:
            return error

    async with httpx.AsyncClient(headers=key_header(os.environ.get(API_KEY))) as client:
        answers = await asyncio.gather(*(answer(client, url) for url in urls))
    return dict(zip(urls, answers, strict=True))


async def _state(client: httpx.AsyncClient, url: str) -> ServerState:
    server = await get_json(client, url, "server_info", "get_server_info")
    states = server.get("internal_states") or ()  # of each replica
    taus = [tau for state in states if (tau := state.get("avg_spec_accept_length"))]
    reported = ServerState(
        url,
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
    )


async def _windows(client: httpx.AsyncClient, url: str, seconds: float) -> list[Finished]:
    windows, before = [], await _counters(client, url)
    for _ in range(_WINDOWS):
        await asyncio.sleep(seconds / _WINDOWS)
        after = await _counters(client, url)
        requests, tokens, steps = (after[name] - before[name] for name in (_REQUESTS, _TOKENS, _STEPS))
        before = after
        if steps > 0:  # negative after a restart
            windows.append(Finished(requests, tokens - requests, steps))
    return windows


async def _counters(client: httpx.AsyncClient, url: str) -> dict[str, float]:
    """Return the server's counters of finished requests, summed over their labels; 0 before the first request."""
    response = await query(client, "GET", f"{url}/metrics")
    if response.status_code == 404:
        raise wrong_server(url, "has no /metrics. Start it with --enable-metrics.")
    check_status("of the metrics", url, response.status_code, response.text)
    counters = dict.fromkeys((_REQUESTS, _TOKENS, _STEPS), 0.0)
    for name, value in _SAMPLE.findall(response.text):
        counters[name] += float(value)
    return counters


def served_tau(windows: Sequence[Finished]) -> SetMetrics:
    """Return tau of the requests in the windows, with its 95 % interval.

    A window is one unit: a request ends in one alone, so windows are as independent as requests are. `prompts` is the
    number of units.
    """
    if not windows:
        return SetMetrics(prompts=0)
    committed, steps = (np.array([getattr(each, name) for each in windows]) for name in ("committed", "steps"))
    tau = jackknife(ratio, committed, steps)
    low, high = tau.interval() or (None, None)
    return SetMetrics(tau=tau.value, low=low, high=high, prompts=tau.units)
