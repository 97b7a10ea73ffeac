"""A line with a champion, and a server whose counters stay below what it was promoted with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.tracking.registry import Version
from draftsmith.flows.refresh.versions import registry
from draftsmith.stages.engines.sglang.protocol import SWAP_STATE
from tests.stages.engines.http_server import serving
from tests.testbed.artifacts import committed

DIGEST = "ab" * 32  # of the drafter that a server serves


def promoted(line: str, key: str, digest: str, tau: float) -> Version:
    """Make a version the champion of a line. digest: of its drafter. tau: what it was promoted with."""
    metrics = {"all": {"tau": 1.5, "low": 1.4, "high": 1.6, "prompts": 100}}  # by replay of another target
    tags = {"drafter_digest": digest, "figures": json.dumps(metrics), "tau": str(tau)}
    tags["tau_interval"] = json.dumps([tau - 0.05, tau + 0.05])
    tags["measured_with"] = json.dumps({"drafting.block_size": 8})
    lines, drafter = registry(), committed(Store(home() / "store"), "opd", {"drafter/config.json": key}, key)
    version = lines.register(line, drafter, tags)
    lines.promote(version, expected=lines.champion(line), why="a test")
    return version


@contextmanager
def server_below_its_promise(line: str) -> Iterator[str]:
    """Yield the address of a server with a line's new champion: tau 2, promoted with 4."""
    promoted(line, "a", DIGEST, 4.0)
    readings = count()

    def counters(_: object) -> str:
        requests = next(readings)
        return (
            f'sglang:num_requests_total{{is_streaming="false"}} {requests}\n'
            f'sglang:generation_tokens_total{{is_streaming="false"}} {101 * requests}\n'
            f"sglang:spec_verify_calls_total {50 * requests}\n"
        )

    served = {"drafter": DIGEST, "since": "2026-11-30T08:00:00+00:00", "before": "", "pause_s": 0.0, "proof": ""}
    state = {SWAP_STATE: served}
    server = {"speculative_algorithm": "DFLASH", "speculative_num_draft_tokens": 8, "internal_states": [state]}
    with serving(lambda _: {}, server_info=lambda _: server, metrics=counters) as running:
        yield running.url
