"""What else a machine did while a turn was measured: other processes, time that its host took, its clocks."""

from __future__ import annotations

import math
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SHORTEST_S = 0.5  # CPU time is counted in hundredths of a second: of shorter turns shares say nothing


@dataclass(frozen=True)
class Load:
    """Of one turn; NaN is what the machine does not say."""

    load_average: float = math.nan  # processes that run or wait, over the last minute
    others_share: float = math.nan  # of the CPU time of all cores: processes that are not ours
    stolen_share: float = math.nan  # of the same: what the host of a virtual machine gave to others
    cpu_mhz: float = math.nan  # of the fastest core, at the end
    gpu_mhz: float = math.nan  # of the fastest visible GPU, at the end


class LoadMeter:
    """Counts from its creation on."""

    def __init__(self) -> None:
        self._began, self._machine, self._own = time.perf_counter(), psutil.cpu_times(), own_seconds()

    def read(self) -> Load:
        """What has happened since."""
        machine, own = psutil.cpu_times(), own_seconds()
        long_enough = time.perf_counter() - self._began >= SHORTEST_S
        passed = {name: now - before for name, now, before in zip(machine._fields, machine, self._machine, strict=True)}
        # guests are counted as user time too; iowait is idle
        total = sum(seconds for name, seconds in passed.items() if not name.startswith("guest"))
        stolen = passed.get("steal", 0.0)
        busy = total - passed["idle"] - passed.get("iowait", 0.0) - stolen
        known = long_enough and total > 0
        return Load(
            load_average=os.getloadavg()[0],
            others_share=max(0.0, busy - (own - self._own)) / total if known else math.nan,
            stolen_share=stolen / total if known else math.nan,
            cpu_mhz=_cpu_mhz(),
            gpu_mhz=_gpu_mhz(),
        )


def machine() -> dict[str, Any]:
    """What is measured on: `cpu` (its name), `cores`, `memory_gb`, `gpus` (their names)."""
    import pynvml

    gpus: list[str] = []
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    memory = round(psutil.virtual_memory().total / 1e9)
    return {"cpu": _cpu_name(), "cores": psutil.cpu_count(), "memory_gb": memory, "gpus": gpus}


def _cpu_name() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def own_seconds() -> float:
    """CPU time of this process and all below it (servers that it launched), those that have ended included."""
    this = psutil.Process()
    seconds = 0.0
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def _cpu_mhz() -> float:
    try:
        return max((core.current for core in psutil.cpu_freq(percpu=True) or ()), default=math.nan) or math.nan
    except (OSError, NotImplementedError, RuntimeError):
        return math.nan


def _gpu_mhz() -> float:
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        names = [(str(index), str(pynvml.nvmlDeviceGetUUID(handle))) for index, handle in enumerate(handles)]
        ours = [handle for handle, name in zip(handles, names, strict=True) if _is_visible(*name)]
        clocks = [float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)) for handle in ours]
    except pynvml.NVMLError:
        return math.nan
    return max(clocks, default=math.nan)


def _is_visible(index: str, uuid: str) -> bool:
    """A part of a GPU (MIG) does not say which GPU's it is: then all are looked at."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return True
    named = [name.strip() for name in listed.split(",") if name.strip()]
    return any(
        name == index or name.startswith("MIG-") or (name.startswith("GPU-") and uuid.startswith(name))
        for name in named
    )
