"""What a stage takes of its machine (CPU, memory, disk, network, GPUs), under the names of MLflow's system metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

EVERY_S = 10.0  # a sample, as MLflow's own monitor takes them
PREFIX = "system/"  # MLflow's page of a run draws these apart
Send = Callable[[int, Mapping[str, float]], None]


@contextmanager
def sampled(send: Send, began: float, every_s: float = EVERY_S) -> Iterator[None]:
    """Send a sample every so many seconds, and one at the end: a short stage has one too.

    send: of a step and its values; steps count the samples since `began` (seconds since the epoch), so that a run that
    goes on goes on counting. MLflow's own monitor ends with the first failure of its server; here that is the sender's
    business.
    """
    monitors, over = _monitors(), threading.Event()

    def sample() -> None:
        figures: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            figures |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        send(int((time.time() - began) / every_s), {f"{PREFIX}{name}": value for name, value in figures.items()})

    def watch() -> None:
        while not over.wait(every_s):
            sample()
        sample()

    thread = threading.Thread(target=watch, daemon=True, name="system-metrics")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _monitors() -> list[BaseMetricsMonitor]:
    """Those of MLflow; of GPUs where the machine has some of NVIDIA's."""
    import pynvml  # noqa: F401  # MLflow's monitor looks whether it was imported
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(ImportError, RuntimeError):  # there is none
        found.append(GPUMonitor())
    return found
