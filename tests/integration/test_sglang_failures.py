"""A real SGLang server that is killed in the middle of a rollout: nothing is lost, repeated or left over.

One of several that is killed: `test_sglang_servers.py`. A stage that is killed: `test_process.py` of the engines'
servers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import RetryableError
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import TIMINGS, TRACE, TRAJECTORIES
from draftsmith.stages.engines.stage import STAGE
from tests.sglang_cpu.options import CPU_ENVIRONMENT, CPU_OPTIONS
from tests.stages.engines.stand_ins import living
from tests.testbed.context import StoppingContext
from tests.testbed.drafter import DrafterArtifacts

pytestmark = [pytest.mark.sglang, pytest.mark.integration]

PROMPTS, KILLED_AFTER = 40, 6


def roll_out(ctx: StoppingContext, engine: dict[str, Any]) -> None:
    sampling = {"max_new_tokens": 100}
    ctx.run(STAGE, splits=["heldout"], prompts=PROMPTS, sampling=sampling, engine=engine, rows_per_shard=4)


def launched(python: Path, environment: Mapping[str, str] = CPU_ENVIRONMENT, **launch: Any) -> dict[str, Any]:
    fields = {"options": CPU_OPTIONS, "environment": environment, **launch}
    return {"kind": "sglang", "python": str(python), "launch": fields, "concurrency": 2}


def context(folder: Path, made: DrafterArtifacts, act: Callable[[], None] | None = None) -> StoppingContext:
    """With `act`, called once this many answers are there."""
    inputs = {"target": made.target, "prompts": made.prompts, "drafter": made.drafter}
    return StoppingContext.under(folder, inputs, stop_after=KILLED_AFTER if act else None, act=act)


def kill_leader(folder: Path) -> None:
    """SIGKILL the server's main process, as the kernel does when memory runs out."""
    group = living(folder)
    assert len(group) >= 4  # server, scheduler, detokenizer, the guard of the lifeline
    leaders = [pid for pid in group if os.getpgid(pid) == pid and b"launch_server" in _command_line(pid)]
    assert len(leaders) == 1
    os.kill(leaders[0], signal.SIGKILL)


def _command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def result(folder: Path) -> list[list[dict[str, Any]]]:
    """Answers and verify steps of a finished rollout, without which engine made them."""
    answers = read_table(folder / "trajectories.parquet", TRAJECTORIES).drop_columns(["engine"])
    trace = read_table(folder / "trace.parquet", TRACE).drop_columns(["target_logprobs"])
    timings = read_table(folder / "timings.parquet", TIMINGS).select(["trajectory_id", "verify_steps"])
    return [table.to_pylist() for table in (answers, trace, timings)]


@pytest.fixture(scope="session")
def expected(tiny_drafter: DrafterArtifacts, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What the embedded engine makes of it."""
    ctx = context(tmp_path_factory.mktemp("embedded"), tiny_drafter)
    roll_out(ctx, {"kind": "embedded"})
    return result(ctx.out)


def generated(log: Path) -> int:
    """Requests that a server has answered, by its access log."""
    return log.read_text(errors="replace").count('"POST /generate HTTP/1.1" 200')


def test_the_last_server_killed_is_worth_a_retry_which_asks_only_for_what_is_missing(
    tmp_path: Path,
    tiny_drafter: DrafterArtifacts,
    sglang_env: Path,
    dflash_url: str,
    sglang_logs: Path,
    expected: list[list[dict[str, Any]]],
) -> None:
    """The rerun asks a server that is there already: engines may be exchanged in the middle of a rollout."""
    servers = tmp_path / "work" / "servers"
    first = context(tmp_path, tiny_drafter, lambda: kill_leader(servers))
    with pytest.raises(RetryableError, match=r"was killed \(SIGKILL\)") as caught:
        roll_out(first, launched(sglang_env))
    assert str(servers / "sglang-0.log") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not living(servers)
    before = generated(sglang_logs / "dflash.log")
    last = context(tmp_path, tiny_drafter)
    roll_out(last, {"kind": "sglang", "urls": [dflash_url]})
    kept = first.progressed[-1][0]
    assert KILLED_AFTER <= kept < PROMPTS
    assert any(line.startswith(f"{kept} answers of an earlier attempt kept") for line in last.logs)
    assert generated(sglang_logs / "dflash.log") - before == PROMPTS - kept + 2  # two are the handshake's
    assert result(last.out) == expected
