"""Rollouts on two real servers of which one is killed, on replicas in one server, and through SGLang's router."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.engines.servers.process import ServerProcess, free_ports
from tests.flows.processes import wait_until
from tests.integration.test_sglang_failures import (  # noqa: F401  (a fixture)
    PROMPTS,
    _command_line,
    context,
    expected,
    launched,
    result,
    roll_out,
)
from tests.sglang_cpu.server import started
from tests.stages.engines.stand_ins import living
from tests.testbed.drafter import DrafterArtifacts

pytestmark = [pytest.mark.sglang, pytest.mark.integration]


def servers_of(folder: Path) -> list[int]:
    """Main processes of the servers that were started there."""
    return [pid for pid in living(folder) if os.getpgid(pid) == pid and b"launch_server" in _command_line(pid)]


def test_one_of_two_servers_that_dies_costs_no_answer(
    tmp_path: Path,
    sglang_env: Path,
    tiny_drafter: DrafterArtifacts,
    expected: list[list[dict[str, Any]]],  # noqa: F811
) -> None:
    def kill_one() -> None:
        servers = servers_of(ctx.work / "servers")
        assert len(servers) == 2
        os.kill(servers[0], signal.SIGKILL)

    ctx = context(tmp_path, tiny_drafter, kill_one)
    roll_out(ctx, launched(sglang_env, servers=2))
    assert result(ctx.out) == expected
    assert any("was killed (SIGKILL)" in line for line in ctx.logs)
    assert not living(ctx.work / "servers")


def test_a_router_that_runs_already_is_a_server_like_any_other(
    tmp_path: Path,
    sglang_env: Path,
    dflash_url: str,
    tiny_drafter: DrafterArtifacts,
    expected: list[list[dict[str, Any]]],  # noqa: F811
) -> None:
    """It forwards no request for verify steps, so that mining replays them."""
    metrics_port, port = free_ports(2)
    command = [str(sglang_env), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--worker-urls", dflash_url]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port), "--log-level", "warn"]
    command += ["--worker-startup-check-interval", "1"]
    ctx = context(tmp_path, tiny_drafter)
    with started(ServerProcess(command, {}, tmp_path / "router.log", port)) as url:
        wait_until(
            lambda: any(each["is_healthy"] for each in httpx.get(f"{url}/workers").json()["workers"]),
            "the router routes",
        )
        roll_out(ctx, {"kind": "sglang", "urls": [url]})
    assert any("routes to 1 servers" in line for line in ctx.logs)
    assert any("verify steps are not recorded" in line for line in ctx.logs)
    answers = read_table(ctx.out / "trajectories.parquet", TRAJECTORIES).drop_columns(["engine"])
    assert answers.to_pylist() == expected[0]
