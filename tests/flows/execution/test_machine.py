"""The GPUs that a run sees; a device has one user at a time, across processes and users."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from draftsmith.artifacts import host
from draftsmith.artifacts.host import Gpu, visible_gpus
from draftsmith.artifacts.locks import Holder, LockTimeoutError, LockWait
from draftsmith.flows.execution import machine
from draftsmith.flows.execution.machine import gpu_names
from draftsmith.stages.engines.stage import STAGE as ROLLOUT
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.gate import STAGE as GATE
from draftsmith.stages.evaluation.stage import STAGE as EVALUATION
from draftsmith.stages.runtime.stage import Compute
from draftsmith.stages.training.sft.stage import STAGE as SFT

GPUS = [("GPU-a1", 24, "RTX 4090"), ("GPU-b2", 80, "H100")]


@pytest.mark.parametrize(
    ("visible", "seen", "memory"),
    [
        ("GPU-b2,0", ["GPU-a1", "GPU-b2"], [80, 24]),
        ("MIG-7f/1/0", ["MIG-7f/1/0"], [24]),
        ("1,2,0", ["GPU-b2"], [80]),
        ("GPU-b", ["GPU-b2"], [80]),
        ("", [], []),
    ],
)
def test_gpus_are_identified_by_uuid(
    visible: str, seen: list[str], memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with several kinds of GPU. CUDA ignores the names after one that does not exist."""
    monkeypatch.setattr(host, "all_gpus", lambda: tuple(Gpu(uuid, gib * 2**30, name) for uuid, gib, name in GPUS))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_names() == seen
    assert [gpu.memory for gpu in visible_gpus()] == [gib * 2**30 for gib in memory]


ONE, OTHER = "GPU-1111aaaa-0000", "GPU-2222bbbb-0000"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(machine.FOLDER, str(tmp_path / "devices"))
    return tmp_path / "devices"


def another_run(compute: str, gpus: Sequence[str]) -> subprocess.Popen[str]:
    """Start a process that locks devices until its input ends."""
    program = f"""
        import sys
        from draftsmith.artifacts.locks import LockWait
        from draftsmith.flows.execution import machine
        from draftsmith.stages.runtime.stage import Compute
        machine.gpu_names = lambda: {list(gpus)!r}
        with machine.lock_devices(Compute.{compute}, "the other", LockWait(60)):
            print("held", flush=True)
            sys.stdin.readline()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize(
    ("theirs", "their_gpus", "ours", "our_gpus", "waits"),
    [
        ("HEAVY", [ONE], Compute.TIMED, [OTHER, ONE], True),
        ("TIMED", [ONE], Compute.HEAVY, [OTHER], False),
        ("HEAVY", [], Compute.HEAVY, [], False),  # the CPU is shared by what trains
        ("HEAVY", [], Compute.TIMED, [], True),  # and not by what measures
        ("TIMED", [], Compute.HEAVY, [], True),
    ],
)
def test_stages_wait_for_devices_in_use(
    theirs: str,
    their_gpus: list[str],
    ours: Compute,
    our_gpus: list[str],
    waits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "gpu_names", lambda: our_gpus)
    process = another_run(theirs, their_gpus)
    said: list[tuple[str, Holder | None]] = []

    def ask(limit_s: float) -> None:
        with machine.lock_devices(ours, "ours", LockWait(limit_s), lambda *who: said.append(who)) as held:
            assert len(held.locks) == (0 if ours is Compute.LIGHT else len(our_gpus) or 1)

    try:
        if waits:
            with pytest.raises(LockTimeoutError, match="the other, pid"):
                ask(0.0)
            ((device, holder),) = said
            assert device in (ONE, machine.CPU) and holder is not None and holder.pid == process.pid
        else:
            ask(0.0)
            assert not said
    finally:
        process.kill()
        process.wait()
    ask(10.0)  # the kernel drops the locks of the dead


def test_all_users_may_take_a_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_names", lambda: [ONE])
    with machine.lock_devices(Compute.TIMED, "", LockWait(1)):
        assert folder.stat().st_mode & 0o7777 == 0o1777
        assert (folder / f"{ONE}.lock").stat().st_mode & 0o777 == 0o666


def test_a_slice_of_a_gpu_is_visible_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = "MIG-7f/1/0"
    monkeypatch.setattr(machine, "gpu_names", lambda: [part])
    with machine.lock_devices(Compute.HEAVY, "", LockWait(1), one=True) as device:
        assert device.environment == {"CUDA_VISIBLE_DEVICES": part}
        assert (folder / "MIG-7f_1_0.lock").exists()


def test_stages_declare_how_they_compute() -> None:
    given = {"engine": {"kind": "sglang", "urls": ["http://host:1"]}}
    assert ROLLOUT.compute_for(RolloutConfig.model_validate(given)) is Compute.LIGHT
    assert ROLLOUT.compute_for(RolloutConfig()) is Compute.HEAVY
    assert SFT.compute_for(SFT.config()) is Compute.HEAVY
    assert EVALUATION.compute_for(EVALUATION.config()) is Compute.TIMED
    assert GATE.compute_for(GATE.config()) is Compute.LIGHT
