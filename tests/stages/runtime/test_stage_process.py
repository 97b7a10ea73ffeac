"""The stage process as its runner sees it: real processes of `python -m draftsmith.stages`."""

from __future__ import annotations

import gc
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from draftsmith.stages.runtime import parent_watch
from draftsmith.stages.runtime.memory import relax_gc
from draftsmith.stages.runtime.process import EventStream, ProcessContext, keep_kernels, use_expandable_segments
from draftsmith.stages.runtime.stage import StageRequest
from tests.flows.processes import ROOT, alive, pid_in, wait_until
from tests.flows.toy import COLLECT

MISBEHAVE = "tests.flows.toy_stages.misbehave"


def start(
    folder: Path,
    module: str,
    config: dict[str, Any],
    *,
    inputs: dict[str, str] | None = None,
    threads: int | None = None,
    lifeline: int | None = None,
    log: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a stage process. log: file for stderr, in place of a pipe."""
    request = {
        "stage": module.rpartition(".")[2],
        "module": module,
        "config": config,
        "inputs": inputs or {},
        "out": str(folder / "out"),
        "work": str(folder / "work"),
        "seed": 7,
        "threads": threads,
    }
    path = folder / "request.json"
    path.write_text(json.dumps(request))
    guard = [] if lifeline is None else [sys.executable, "-I", "-S", parent_watch.__file__, str(lifeline)]
    with (log or Path(os.devnull)).open("w") as file:
        return subprocess.Popen(
            [*guard, sys.executable, "-m", "draftsmith.stages", str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=file if log else subprocess.PIPE,
            start_new_session=True,
            pass_fds=() if lifeline is None else (lifeline,),
        )


def finish(process: subprocess.Popen[bytes], limit_s: int = 60) -> tuple[int, list[dict[str, Any]], str]:
    """Return (exit code, events, stderr); a line on stdout that is not an event fails the test."""
    out, err = process.communicate(timeout=limit_s)
    return process.returncode, [json.loads(line) for line in out.splitlines()], (err or b"").decode()


def test_a_stage_reports_its_work_and_leaves_its_output(tmp_path: Path) -> None:
    code, events, _ = finish(start(tmp_path, COLLECT, {"count": 2}))
    assert code == 0
    assert [event["event"] for event in events] == [
        *("log", "metrics", "progress", "metrics", "progress", "summary", "summary", "done"),
    ]
    assert events[2] == {"event": "progress", "done": 1, "total": 2, "unit": "numbers", "metrics": {"last": 7}}
    assert events[5]["values"] == {"numbers": 2.0}
    assert events[6]["values"].keys() == {"peak_memory_gb"}
    assert json.loads((tmp_path / "out" / "numbers.json").read_text()) == [7, 8]
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert metrics == [{"step": 1, "value": 7.0}, {"step": 2, "value": 8.0}]


@pytest.mark.parametrize(
    ("environment", "value"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_the_allocator_is_configured_unless_the_user_did(
    environment: dict[str, str], value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", environment)
    use_expandable_segments()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == value


def test_compiled_kernels_are_kept_in_the_home_unless_the_user_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"DRAFTSMITH_HOME": str(tmp_path), "TRITON_CACHE_DIR": "/mine"})
    keep_kernels()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "kernels" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"


def test_garbage_collection_is_relaxed_until_the_first_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_tests, usual, heard = gc.get_threshold(), (700, 10, 10), os.open(os.devnull, os.O_WRONLY)
    monkeypatch.setattr("draftsmith.stages.runtime.memory._DEFAULT", usual)
    request = StageRequest(stage="collect", module=COLLECT, config={}, inputs={}, out=tmp_path, work=tmp_path, seed=0)
    context = ProcessContext(request, EventStream(heard), threading.Event())
    try:
        relax_gc()
        context.log("libraries are being imported")
        assert gc.get_threshold()[0] > 10 * usual[0]
        context.progress(1, 2, "numbers")
        assert gc.get_threshold() == usual
    finally:
        gc.set_threshold(*of_tests)
        os.close(heard)


@pytest.mark.parametrize(
    ("module", "config", "code", "message"),
    [
        (COLLECT, {"fail_at": 1}, 2, "number 1 is bad: remove it"),
        (MISBEHAVE, {"way": "raise"}, 1, "ValueError: the matrix is singular"),
        (MISBEHAVE, {"way": "quote"}, 1, "ValueError: a field is named \\ud83d\\x1b[2J"),
        (MISBEHAVE, {"way": "full-disk"}, 2, "the disk is full"),
        (MISBEHAVE, {"way": "sing"}, 1, "way"),
    ],
)
def test_a_failed_stage_ends_with_one_error_event_and_its_traceback_in_the_log(
    tmp_path: Path, module: str, config: dict[str, Any], code: int, message: str
) -> None:
    returned, events, log = finish(start(tmp_path, module, config))
    assert returned == code
    assert [event["event"] for event in events].count("error") == 1
    assert events[-1]["event"] == "error"
    assert message in events[-1]["message"]
    assert "\n" not in events[-1]["message"]
    assert "Traceback" in log and "\x1b" not in log


@pytest.mark.parametrize(("way", "code"), [("full-disk", 2), ("raise", 1)])
def test_the_error_is_reported_even_if_the_log_is_on_a_full_disk(tmp_path: Path, way: str, code: int) -> None:
    returned, events, _ = finish(start(tmp_path, MISBEHAVE, {"way": way}, log=Path("/dev/full")))
    assert (returned, [event["event"] for event in events].count("error")) == (code, 1)


def test_a_lost_engine_has_the_exit_code_of_a_retry(tmp_path: Path) -> None:
    code, events, _ = finish(start(tmp_path, COLLECT, {"lose_engine_until": str(tmp_path / "lost")}))
    assert (code, events[-1]["kind"]) == (75, "RetryableError")


def test_prints_of_libraries_stay_out_of_the_event_stream(tmp_path: Path) -> None:
    code, events, log = finish(start(tmp_path, MISBEHAVE, {"way": "print"}))
    assert (code, [event["event"] for event in events]) == (0, ["summary", "done"])
    assert "a library that prints" in log
    assert "native code that prints" in log


def test_the_number_of_threads_is_set_before_the_stage_is_imported(tmp_path: Path) -> None:
    _, events, _ = finish(start(tmp_path, MISBEHAVE, {"way": "threads"}, threads=3))
    assert events[0]["values"] == {"threads": 3.0}


def test_rewinding_drops_later_metrics_and_a_half_written_line(tmp_path: Path) -> None:
    finish(start(tmp_path, MISBEHAVE, {"way": "rewind"}))
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == [(0, 0.0), (1, 1.0), (2, 20.0)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_is_asked_to_stop_saves_and_continues_later(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, COLLECT, {"count": 50, "seconds_each": 0.1})
    saved = tmp_path / "work" / "saved.json"
    wait_until(saved.exists, "the first number is saved")
    process.send_signal(number)
    code, events, _ = finish(process)
    assert (code, events[-1]["kind"]) == (130, "StageInterrupted")
    first = len(json.loads(saved.read_text()))
    assert 0 < first < 50

    code, events, _ = finish(start(tmp_path, COLLECT, {"count": 50}))
    assert code == 0
    assert events[0] == {"event": "log", "message": f"going on from {first}"}


def test_stage_and_worker_end_with_the_parent(tmp_path: Path) -> None:
    lifeline, our_end = os.pipe()
    worker_file = tmp_path / "worker"
    process = start(
        tmp_path, COLLECT, {"count": 9999, "seconds_each": 1, "worker": str(worker_file)}, lifeline=lifeline
    )
    os.close(lifeline)
    worker = pid_in(worker_file)
    assert alive(process.pid)
    assert alive(worker)
    os.close(our_end)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL
    wait_until(lambda: not alive(worker), "the worker is gone", limit_s=5)


_REUSE = """
import resource, sys
import torch
from draftsmith.stages.runtime.process import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def work():
    for size in (2**20, 2**24):  # 4 and 64 MB: what glibc trims, and what it maps
        torch.ones(size).add(1)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_reused() -> None:
    faults = {}
    for how in ("usual", "kept"):
        done = subprocess.run([sys.executable, "-c", _REUSE, how], cwd=ROOT, capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert 10 * faults["kept"] < faults["usual"]  # pages that the kernel had to clear again
