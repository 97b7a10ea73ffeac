"""A stage's process: outcomes, the time limit, and that nothing outlives its runner."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.locks import is_locked
from draftsmith.flows.execution.process import (
    Event,
    StageFailedError,
    run_stage,
)
from draftsmith.stages.runtime.stage import StageRequest
from tests.flows.processes import ROOT, assert_gone, pid_in, wait_until
from tests.flows.toy import COLLECT

MISBEHAVE = "tests.flows.toy_stages.misbehave"


def run(
    folder: Path,
    module: str,
    config: dict[str, Any],
    *,
    limit_s: float = 60,
    grace_s: float = 5,
    on_event: Callable[[Event], None] = lambda _: None,
    pass_fds: tuple[int, ...] = (),
) -> dict[str, float]:
    request = StageRequest(
        stage="toy", module=module, config=config, inputs={}, out=folder / "out", work=folder / "work", seed=0
    )
    log = folder / "toy.log"
    return run_stage(request, log, node="toy", limit_s=limit_s, grace_s=grace_s, follow=on_event, descriptors=pass_fds)


@pytest.mark.parametrize(
    ("module", "config", "kind", "message"),
    [
        (COLLECT, {"fail_at": 0}, DraftsmithError, "number 0 is bad: remove it"),
        (MISBEHAVE, {"way": "raise"}, StageFailedError, "ValueError: the matrix is singular"),
        (MISBEHAVE, {"way": "kill-itself"}, StageFailedError, "out of memory"),
        (MISBEHAVE, {"way": "exit"}, StageFailedError, "code 3"),
    ],
)
def test_an_error_is_one_line_with_the_path_of_the_log(
    tmp_path: Path, module: str, config: dict[str, Any], kind: type[DraftsmithError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        run(tmp_path, module, config)
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "toy.log") in str(caught.value)


def test_metrics_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    summary = run(tmp_path, MISBEHAVE, {"way": "nan"})
    assert summary.keys() == {"steps", "peak_memory_gb"}
    assert summary["peak_memory_gb"] > 0.005  # Python alone takes more


def test_at_the_time_limit_the_stage_saves_and_its_worker_is_killed(tmp_path: Path) -> None:
    worker_file = tmp_path / "worker"
    with pytest.raises(DraftsmithError, match=r"limit of 0\.03\d* minutes.*Raise stages\.time_limits\.toy and"):
        run(tmp_path, COLLECT, {"count": 999, "seconds_each": 0.1, "worker": str(worker_file)}, limit_s=2)
    assert_gone(pid_in(worker_file))
    assert json.loads((tmp_path / "work" / "saved.json").read_text())


def test_a_stage_that_does_not_stop_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    began: list[float] = []

    def stop(_event: Event) -> None:
        began.append(time.monotonic())
        raise DraftsmithError("the lock is lost")

    with pytest.raises(DraftsmithError, match="the lock is lost"):
        run(tmp_path, MISBEHAVE, {"way": "ignore-sigterm"}, grace_s=1, on_event=stop)
    assert 1 <= time.monotonic() - began[0] < 60


def test_a_stage_has_its_grace_period_although_its_runner_is_killed(tmp_path: Path) -> None:
    """Prefect kills a cancelled run so: SIGTERM, then SIGKILL before the stage has saved."""
    program = f"""
        import signal
        from pathlib import Path
        from tests.flows.execution.test_process import run

        def stop(*_):
            raise SystemExit

        signal.signal(signal.SIGTERM, stop)
        config = {{"count": 999, "seconds_each": 0.05, "seconds_to_save": 2, "worker": {str(tmp_path / "worker")!r}}}
        run(Path({str(tmp_path)!r}), {COLLECT!r}, config, grace_s=30)
    """
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths}
    runner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, env=environment)
    worker = pid_in(tmp_path / "worker")
    wait_until((tmp_path / "work" / "saved.json").exists, "it works")
    runner.send_signal(signal.SIGTERM)
    time.sleep(0.7)
    runner.kill()
    runner.wait()
    assert not (tmp_path / "work" / "saved-when-asked").exists()
    wait_until((tmp_path / "work" / "saved-when-asked").exists, "it has saved", limit_s=20)
    assert_gone(worker)


def test_a_worker_does_not_outlive_a_successful_stage(tmp_path: Path) -> None:
    worker_file = tmp_path / "worker"
    run(tmp_path, COLLECT, {"count": 1, "worker": str(worker_file)})
    assert_gone(pid_in(worker_file))


def test_the_stage_keeps_an_inherited_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    ours = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(ours, fcntl.LOCK_EX)
    others = os.open(lock, os.O_RDWR)
    blocked: list[bool] = []

    def follow(event: Event) -> None:
        nonlocal ours
        if event["event"] != "progress":
            return
        if ours >= 0:
            os.close(ours)  # as if we had died
            ours = -1
        try:
            fcntl.flock(others, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            blocked.append(True)

    run(tmp_path, COLLECT, {"count": 3, "seconds_each": 0.1}, on_event=follow, pass_fds=(ours,))
    assert len(blocked) == 3
    os.close(others)
    wait_until(lambda: not is_locked(lock), "the lock is free", limit_s=5)
