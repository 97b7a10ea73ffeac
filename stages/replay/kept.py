"""Traces on disk while a replay runs, so that an interrupted stage goes on with the trajectories that are missing.

Shards of what the last half minute replayed: that is what a kill loses, and many short groups make few files.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.artifacts.atomic import atomic_path
from draftsmith.stages.replay.trace import Trace

WRITTEN_EVERY_S = 30.0
_STEPS = ("anchors", "accepted", "proposed", "drafter_logprobs")  # arrays of a row a step
_SOMETIMES = ("expected", "verified")  # others, of all traces or none
_NUMBERS = ("length", "evaluated_blocks", "outside_nucleus")  # one a trace


class KeptTraces:
    """The traces of some drafters, by the trajectory's place in the corpus. The folder is of this replay alone."""

    def __init__(self, folder: Path, drafters: Iterable[str]):
        self.folder, self.drafters = folder, list(drafters)
        self._waiting: dict[int, dict[str, Trace]] = {}
        self._written = time.monotonic()
        self._there = sorted(folder.glob("traces-*.npz"))
        self._next = int(self._there[-1].stem.removeprefix("traces-")) + 1 if self._there else 0

    def read(self) -> Iterator[tuple[list[int], list[dict[str, Trace]]]]:
        """What an earlier run has left, a shard at a time: places, and their traces by drafter."""
        for path in self._there:
            found = _read(path, self.drafters)
            yield list(found), list(found.values())

    def add(self, places: Sequence[int], found: Mapping[str, Sequence[Trace]]) -> None:
        """Keep a group's traces; on disk after a while, or with `flush`."""
        for row, place in enumerate(places):
            self._waiting[place] = {name: found[name][row] for name in self.drafters}
        if time.monotonic() - self._written >= WRITTEN_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Everything that was added is on disk."""
        if self._waiting:
            with atomic_path(self.folder / f"traces-{self._next:05d}.npz") as tmp, tmp.open("wb") as file:
                np.savez(file, **_arrays(self._waiting, self.drafters))  # type: ignore[arg-type]
            self._next += 1
            self._waiting = {}
        self._written = time.monotonic()


def _arrays(traces: Mapping[int, Mapping[str, Trace]], drafters: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = {"places": np.array(list(traces)), "drafters": np.array(drafters)}
    for d, name in enumerate(drafters):
        of_drafter = [each[name] for each in traces.values()]
        arrays[f"{d}.steps"] = np.array([len(trace.anchors) for trace in of_drafter])
        for field in _NUMBERS:
            arrays[f"{d}.{field}"] = np.array([getattr(trace, field) for trace in of_drafter])
        for field in _STEPS:
            joined = np.concatenate([getattr(trace, field) for trace in of_drafter])
            if field != "drafter_logprobs" or not np.isnan(joined).all():  # often they were not computed
                arrays[f"{d}.{field}"] = joined
        for field in _SOMETIMES:
            if getattr(of_drafter[0], field) is not None:  # of all: they are drafted alike
                arrays[f"{d}.{field}"] = np.concatenate([getattr(trace, field) for trace in of_drafter])
    return arrays


def _read(path: Path, drafters: Sequence[str]) -> dict[int, dict[str, Trace]]:
    """Of one shard; nothing of a damaged one (zip has checksums) or one of other drafters: it is replayed again."""
    try:
        with np.load(path) as arrays:
            if arrays["drafters"].tolist() != list(drafters):
                return {}
            traces: dict[int, dict[str, Trace]] = {int(place): {} for place in arrays["places"]}
            for d, name in enumerate(drafters):
                ends = np.cumsum(arrays[f"{d}.steps"])[:-1]
                columns = {
                    field: np.split(arrays[f"{d}.{field}"], ends)
                    for field in (*_STEPS, *_SOMETIMES)
                    if f"{d}.{field}" in arrays
                }
                numbers = {field: arrays[f"{d}.{field}"] for field in _NUMBERS}
                for row, place in enumerate(traces):
                    steps: dict[str, Any] = {field: values[row] for field, values in columns.items()}
                    steps.setdefault("drafter_logprobs", np.full(steps["proposed"].shape, np.nan, dtype=np.float32))
                    steps |= {field: int(values[row]) for field, values in numbers.items()}
                    traces[place][name] = Trace(**steps)
            return traces
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
