"""The machine that speed is measured on, and the share of its CPU time that other programs take."""

from __future__ import annotations

import math
import platform
import time
from contextlib import suppress
from pathlib import Path

import psutil

from draftsmith.artifacts.host import all_gpus
from draftsmith.artifacts.results.evaluation import Machine

SHORTEST_S = 0.5  # CPU time is counted in hundredths of a second: shares of shorter spans mean nothing


class LoadMeter:
    """Measures CPU time from its creation on."""

    def __init__(self) -> None:
        self._began, self._machine, self._own = time.perf_counter(), psutil.cpu_times(), own_seconds()

    def others_share(self) -> float:
        """Return the share of all cores' CPU time that other processes, and other guests of the host, took since.

        NaN if too little time has passed.
        """
        machine, own = psutil.cpu_times(), own_seconds()
        passed = {name: now - before for name, now, before in zip(machine._fields, machine, self._machine, strict=True)}
        # guests are counted as user time too; iowait is idle
        total = sum(seconds for name, seconds in passed.items() if not name.startswith("guest"))
        if time.perf_counter() - self._began < SHORTEST_S or total <= 0:
            return math.nan
        busy = total - passed["idle"] - passed.get("iowait", 0.0)
        return max(0.0, busy - (own - self._own)) / total


def machine() -> Machine:
    """Return a description of this machine."""
    return Machine(
        cpu=_cpu_name(),
        cores=psutil.cpu_count(),
        memory_gb=round(psutil.virtual_memory().total / 1e9),
        gpus=[gpu.model for gpu in all_gpus()],
    )


def _cpu_name() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def own_seconds() -> float:
    """Return the CPU time of this process and its descendants (servers that it launched), ended ones included."""
    this = psutil.Process()
    seconds = 0.0
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds
