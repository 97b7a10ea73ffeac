"""Asks running servers for their drafter, and for tau according to the engine's metrics."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import astuple
from typing import TypeVar

import httpx
import numpy as np

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.stages.engines.servers.http import (
    check_status,
    key_header,
    query,
    reachable,
    wrong_server,
)
from draftsmith.stages.engines.servers.state import Finished, ServerState
from draftsmith.stages.engines.sglang import swap as sglang
from draftsmith.stages.engines.vllm import swap as vllm
from draftsmith.stages.runtime.statistics import jackknife, ratio

API_KEYS = {"sglang": "SGLANG_API_KEY", "vllm": "VLLM_API_KEY"}  # kind -> variable with its servers' key, if any
_WINDOWS = 30  # windows in the time that servers are watched
_T = TypeVar("_T")


def ask_servers(urls: Sequence[str], *, named: bool = False) -> dict[str, ServerState | DraftsmithError]:
    """Return the state of each server, or why it is unknown: a RetryableError if the server does not answer.

    named: same as in `from_servers`.
    """
    return from_servers(urls, _state, named=named)


def count_finished(
    urls: Sequence[str], seconds: float, *, named: bool = False
) -> dict[str, list[Finished] | DraftsmithError]:
    """Return the requests that each server finishes per window of the next seconds, or why that is unknown.

    Windows without a verify step do not count. named: same as in `from_servers`.
    """
    return from_servers(urls, lambda client, url: _windows(client, url, seconds), named=named)


def from_servers(
    urls: Sequence[str], ask: Callable[[httpx.AsyncClient, str], Awaitable[_T]], *, named: bool = False
) -> dict[str, _T | DraftsmithError]:
    """Return what `ask` returns of each server, or its error: a RetryableError if the server does not answer.

    named: the config or the command line names these servers, so they get the API key of the environment. A server that
    only a tag in MLflow names never gets it: anyone who may write tags could read it.
    """

    async def answer(url: str) -> _T | DraftsmithError:
        try:
            with reachable(url):
                async with httpx.AsyncClient() as client:
                    if named:
                        metrics = (await query(client, "GET", f"{url}/metrics")).text  # neither engine asks for a key
                        kind = "vllm" if vllm.is_vllm(metrics) else "sglang"
                        client.headers.update(key_header(os.environ.get(API_KEYS[kind])))
                    return await ask(client, url)
        except DraftsmithError as error:
            return error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__} {error}"[:200]
            return DraftsmithError(f"{url}: its answer cannot be read ({reason}). Check the URL and release.")

    async def answers() -> list[_T | DraftsmithError]:
        return await asyncio.gather(*map(answer, urls))

    return dict(zip(urls, asyncio.run(answers()), strict=True))


async def _state(client: httpx.AsyncClient, url: str) -> ServerState:
    metrics = (await query(client, "GET", f"{url}/metrics")).text
    if vllm.is_vllm(metrics):
        return await vllm.server_state(client, url, metrics)
    return await sglang.server_state(client, url)


async def _windows(client: httpx.AsyncClient, url: str, seconds: float) -> list[Finished]:
    windows, before = [], await _finished(client, url)
    for _ in range(_WINDOWS):
        await asyncio.sleep(seconds / _WINDOWS)
        after = await _finished(client, url)
        new = Finished(*(now - then for now, then in zip(astuple(after), astuple(before), strict=True)))
        before = after
        if new.steps > 0:  # negative after a restart
            windows.append(new)
    return windows


async def _finished(client: httpx.AsyncClient, url: str) -> Finished:
    """Return the requests that a server finished since its start."""
    response = await query(client, "GET", f"{url}/metrics")
    if response.status_code == 404:
        raise wrong_server(url, "has no /metrics. Start it with --enable-metrics.")
    check_status("of the metrics", url, response.status_code, response.text)
    return (vllm if vllm.is_vllm(response.text) else sglang).finished(response.text)


def served_tau(windows: Sequence[Finished]) -> SetMetrics:
    """Return tau of the requests in the windows, with its 95 % interval.

    A window is one unit, `prompts` their number. SGLang counts a request when it ends, so windows are as independent as
    requests are. vLLM counts each step, so they are if requests are shorter than windows.
    """
    if not windows:
        return SetMetrics(prompts=0)
    committed, steps = (np.array([getattr(window, name) for window in windows]) for name in ("committed", "steps"))
    tau = jackknife(ratio, committed, steps)
    low, high = tau.interval() or (None, None)
    return SetMetrics(tau=tau.value, low=low, high=high, prompts=tau.units)
