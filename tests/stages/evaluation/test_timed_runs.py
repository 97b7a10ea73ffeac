"""The load of other programs, measured while a process takes CPU time."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import psutil

from draftsmith.stages.evaluation.timed_runs import SHORTEST_S, LoadMeter, machine, own_seconds

BURN = "import time\nend = time.process_time() + 1.0\nwhile time.process_time() < end: pass"


def test_cpu_time_of_other_processes_counts_and_our_own_does_not() -> None:
    cores = psutil.cpu_count() or 1
    before = own_seconds()
    subprocess.run([sys.executable, "-c", BURN], check=True)  # ours: as a server that we launched
    assert own_seconds() - before > 0.9

    before = own_seconds()
    meter, began = LoadMeter(), time.perf_counter()
    marker = f"{sys.executable} -c '{BURN}' & echo $!"
    done = subprocess.run(["sh", "-c", f"setsid {marker}"], capture_output=True, text=True, check=True)
    burner = psutil.Process(int(done.stdout))  # not a child: its parent has ended
    assert burner not in psutil.Process().children(recursive=True)
    while burner.is_running() and burner.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    theirs, seconds = meter.others_share(), time.perf_counter() - began
    assert theirs * cores * seconds > 0.8, "a second of CPU time"
    assert own_seconds() - before < 0.8


def test_the_share_of_too_short_a_span_is_unknown() -> None:
    assert SHORTEST_S > 0.1
    assert math.isnan(LoadMeter().others_share())


def test_the_machine_is_named() -> None:
    found = machine()
    assert found.cores == psutil.cpu_count() and found.memory_gb
    assert isinstance(found.cpu, str) and found.cpu
    assert all(isinstance(name, str) for name in found.gpus)
