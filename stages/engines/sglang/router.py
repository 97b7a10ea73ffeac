"""SGLang's router: its command line, and the servers that it routes to.

A router forwards only fields of a request that it knows (0.3.2: not `custom_params`, `stream_interval` or
`/abort_request`). So its servers record verify steps only if their environment asks for it, which a request through the
router finds out, and an abort goes to each of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import httpx

from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.servers.client import (
    RefusedRequestError,
    RequestLostError,
    check_status,
    query,
    unreachable_server,
)

_SCRIPT = Path(__file__).with_name("router_main.py")
_EXTRA_TIMEOUT_S = 60


def router_command(config: SGLangEngineConfig, workers: Sequence[str], metrics_port: int) -> list[str]:
    """Return the command line of a router in front of launched servers, without its port."""
    assert config.launch is not None and config.launch.router is not None
    return [
        os.fspath(config.interpreter),
        os.fspath(_SCRIPT),
        *("--host", "127.0.0.1", "--policy", config.launch.router, "--worker-urls", *workers),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
        # a server that failed for a moment is tried again soon
        *("--worker-startup-check-interval", "1", "--health-check-interval-secs", "2"),
        *("--health-success-threshold", "1", "--cb-timeout-duration-secs", "5"),
        # The router does not retry, so that a request that ends servers is counted here. Until the router has dropped a
        # dead server, each request that it sends there costs one attempt.
        *("--disable-retries", "--cb-failure-threshold", "2"),
        # longer than our own limit, since a timeout of the router is an error 5xx, which would be retried
        *("--request-timeout-secs", str(round(config.request_timeout_s) + _EXTRA_TIMEOUT_S), "--log-level", "warn"),
    ]


async def router_workers(client: httpx.AsyncClient, url: str) -> list[str] | None:
    """Return the addresses of a router's healthy servers; None: it is no router.

    Raises RetryableError if it does not answer or cannot say, DraftsmithError for one that wants a key.
    """
    try:
        response = await query(client, "GET", f"{url}/workers")
        if response.status_code == 501:
            return None  # a gateway that knows no such path
        check_status("of the handshake", url, response.status_code, response.text)
        return [str(each["url"]) for each in response.json()["workers"] if each.get("is_healthy")]
    except RequestLostError as error:
        raise unreachable_server(url, error) from error
    except (RefusedRequestError, ValueError, KeyError, TypeError):
        return None  # a server, or a gateway in front of one, which the handshake checks
