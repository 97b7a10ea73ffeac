"""Where a training step's time goes: the target's forwards and single kernels, by torch's profiler."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from draftsmith.stages.targets.causal_lm import Target
from tests.benchmarks import harness
from tests.testbed.context import RecordingContext

TARGET = "target forward"  # as it is called in a profile


@dataclass
class Timed(RecordingContext):
    """The context of a training that records when each step ended, queued kernels included."""

    ends: list[float] = field(default_factory=list)
    after_step: Callable[[], object] = lambda: None

    def progress(self, done: int, total: int, unit: str, **metrics: float) -> None:
        harness.drain()
        super().progress(done, total, unit, **metrics)
        self.ends.append(time.perf_counter())
        self.after_step()


@contextmanager
def watched(target: Target) -> Iterator[None]:
    """Name the target's reads in profiles."""

    def recorded(work: Callable[..., Any]) -> Callable[..., Any]:
        def forward(ids: torch.Tensor, *arguments: Any) -> Any:
            with record_function(TARGET):
                return work(ids, *arguments)

        return forward

    with (
        patch.object(target, "read", recorded(target.read)),
        patch.object(target, "features", recorded(target.features)),
    ):
        yield


@dataclass(frozen=True)
class Kernel:
    """A kernel's share in the time of all, and how often it ran."""

    share: float
    calls: int


class Profile:
    """The profile of a training's second step."""

    def __init__(self, device: torch.device):
        self._on_device = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._on_device]
        # the first step is traced too and discarded: a profiler starts slowly
        self.profiler = profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=1, repeat=1))

    def kernels(self) -> dict[str, Kernel]:
        """Return the kernels by name, the longest first; on a CPU, its operations."""
        seconds: dict[str, float] = {}
        calls: Counter[str] = Counter()
        for event in self._work():
            seconds[event.name] = seconds.get(event.name, 0.0) + self._own(event)
            calls[event.name] += 1
        whole = sum(seconds.values())
        longest = sorted(seconds.items(), key=lambda item: -item[1])
        return {name: Kernel(spent / whole, calls[name]) for name, spent in longest}

    def target_share(self) -> float:
        """Return the share of the target's forwards, wherever in the step they ran."""
        spent = sum(
            event.device_time_total if self._on_device else event.cpu_time_total
            for event in self._events()
            if event.name == TARGET and event.device_type == DeviceType.CPU
        )
        return float(spent / sum(map(self._own, self._work())))

    def _events(self) -> list[Any]:
        return list(self.profiler.events() or [])

    def _work(self) -> list[Any]:
        """Return kernels, or operations of the CPU, without the ranges that name them."""
        kind = DeviceType.CUDA if self._on_device else DeviceType.CPU
        return [event for event in self._events() if event.device_type == kind and not event.is_user_annotation]

    def _own(self, event: Any) -> float:
        """Return microseconds."""
        return float(event.self_device_time_total if self._on_device else event.self_cpu_time_total)
