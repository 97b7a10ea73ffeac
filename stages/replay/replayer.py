"""Replay and mining of a set of trajectories, in groups of similar length that the target reads in one forward each."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

from draftsmith.artifacts.atomic import atomic_path
from draftsmith.stages.data.trajectories import Trajectory, groups_by_length, lengths_of, pad_tokens
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.replay.chains import replay_chains
from draftsmith.stages.replay.options import TREE_TOKENS, ReplayOptions
from draftsmith.stages.replay.sampled import TargetSampler, outside_nucleus
from draftsmith.stages.replay.scoring import StepScores, score_traces
from draftsmith.stages.replay.stats import AcceptanceStats
from draftsmith.stages.replay.trace import Trace
from draftsmith.stages.runtime.memory import retry_in_halves
from draftsmith.stages.runtime.stage import WHOLE, Shard
from draftsmith.stages.target.causal_lm import Target, TargetOutput
from draftsmith.stages.target.kv_cache import SlotCache
from draftsmith.stages.target.sampling import SamplingParams

Found = TypeVar("Found")
Replayed: TypeAlias = tuple[list[int], list[dict[str, Trace]]]  # indices in the set, and traces by drafter of each


class TraceConsumer(Protocol):
    """What needs every trace once."""

    def add(self, places: Sequence[int], traces: Sequence[Trace]) -> None:
        """Take the traces of the trajectories at `places`."""


def do_nothing(*_: Any) -> None:
    """Report progress, or log a line, to nobody."""


@dataclass(frozen=True)
class MinedGroup:
    """The traces of one group, and what the target said of proposals."""

    trajectories: list[Trajectory]
    traces: list[Trace]
    scores: list[StepScores]


class Replayer:
    """Replays drafters on trajectories. The target reads each trajectory once for all of them."""

    def __init__(
        self, target: Target, options: ReplayOptions | None = None, log: Callable[[str], None] = do_nothing
    ) -> None:
        """log: takes a line where memory was refused and a group is done in two halves."""
        self.target, self.options, self.log = target, options or ReplayOptions(), log

    def traces(
        self, drafters: Mapping[str, Drafter], trajectories: Sequence[Trajectory], **settings: Any
    ) -> dict[str, list[Trace]]:
        """Return the traces of every drafter, in the order of the trajectories. settings: as of `groups`.

        All traces are in memory at once: for the metrics of many trajectories there is `acceptance`.
        """
        traces: dict[int, dict[str, Trace]] = {}
        for indices, found in self.groups(drafters, trajectories, **settings):
            traces |= dict(zip(indices, found, strict=True))
        return {name: [traces[i][name] for i in range(len(trajectories))] for name in drafters}

    def acceptance(
        self,
        drafters: Mapping[str, Drafter],
        trajectories: Sequence[Trajectory],
        *,
        also: Mapping[str, TraceConsumer] | None = None,
        **settings: Any,
    ) -> dict[str, AcceptanceStats]:
        """Return tallies in place of traces. also: what takes those of a drafter too. settings: as of `groups`."""
        tallies = {name: AcceptanceStats(len(trajectories)) for name in drafters}
        for indices, found in self.groups(drafters, trajectories, **settings):
            for name, tally in tallies.items():
                traces = [each[name] for each in found]
                tally.add(indices, traces)
                if also and name in also:
                    also[name].add(indices, traces)
        return tallies

    def groups(
        self,
        drafters: Mapping[str, Drafter],
        trajectories: Sequence[Trajectory],
        *,
        progress: Callable[[int, int], Any] = do_nothing,
        kept: Path | None = None,
        done: Sequence[Path] = (),
    ) -> Iterator[Replayed]:
        """Yield the traces of every drafter, some trajectories at a time, each trajectory once.

        progress: takes trajectories done and in all, after every group. kept: a folder of this replay alone, in which
        an interrupted one finds what it has done. done: such folders of others, with shards of the same.
        """
        options, target = self.options, self.target
        layer_ids = sorted({layer for d in drafters.values() for layer in d.target_layer_ids})
        ready = {name: _PreparedDrafter.of(target, drafter, options) for name, drafter in drafters.items()}

        def replay(group: Group) -> list[dict[str, Trace]]:
            hidden, outside = None, [0] * len(group.trajectories)
            if any(samples_proposals(drafter, options.sampling) for drafter in drafters.values()):
                out = target.read(group.ids, layer_ids)
                features, hidden = out.features, out.hidden
                outside = outside_nucleus(target, hidden, group.trajectories, options.sampling)
                assert features is not None
            else:
                features = target.features(group.ids, layer_ids)
            by_layer = dict(zip(layer_ids, features.chunk(len(layer_ids), -1), strict=True))
            found = {}
            for name, each in ready.items():
                features = torch.cat([by_layer[k] for k in each.drafter.target_layer_ids], -1)
                found[name] = _with_outside(each.replay(target, features, group, hidden), outside)
            return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]

        names, there = list(drafters), np.zeros(len(trajectories), dtype=bool)
        store = TraceCache(kept, names) if kept is not None else None
        for folder in (*((store,) if store is not None else ()), *(TraceCache(folder, names) for folder in done)):
            for indices, found in folder.read():
                new = [row for row, index in enumerate(indices) if not there[index]]
                there[indices] = True
                yield [indices[row] for row in new], [found[row] for row in new]
        total = count_in(trajectories, options.tokens_per_group, options.shard)
        try:
            for group in self._groups_of(trajectories, lambda each: bool(there[each].all())):
                found = _in_halves(group, replay, self.log)
                if store is not None:
                    store.add(group.indices, {name: [each[name] for each in found] for name in names})
                new = [row for row, index in enumerate(group.indices) if not there[index]]
                there[group.indices] = True
                yield [group.indices[row] for row in new], [found[row] for row in new]
                progress(int(there.sum()), total)
        finally:
            if store is not None:
                store.flush()

    def mine(
        self,
        drafter: Drafter,
        trajectories: Sequence[Trajectory],
        *,
        suffixes: bool = True,
        finished: Callable[[list[int]], bool] = lambda _indices: False,
    ) -> Iterator[MinedGroup]:
        """Replay and score group by group, except those that are `finished`, which is asked with their indices.

        The target reads a group once: its hidden states serve the drafter and the proposals up to the first rejection.
        suffixes: those after it are scored too, on the key/value cache of that read.
        """
        target, sampling = self.target, self.options.sampling
        ready = _PreparedDrafter.of(target, drafter, self.options)
        tree_tokens = max(TREE_TOKENS, ready.block_size)

        def replay(group: Group) -> list[tuple[Trace, StepScores]]:
            cache = None
            if suffixes:
                out, cache = read(target, group, tree_tokens, drafter.target_layer_ids)
            else:
                out = target.read(group.ids, drafter.target_layer_ids)
            assert out.features is not None
            traces = ready.replay(target, out.features, group, out.hidden)
            if samples_proposals(drafter, sampling):
                traces = _with_outside(traces, outside_nucleus(target, out.hidden, group.trajectories, sampling))
            scores = score_traces(target, cache, out.hidden, traces, ids=group.ids, tree_tokens=tree_tokens)
            return list(zip(traces, scores, strict=True))

        for group in self._groups_of(trajectories, finished):
            found = _in_halves(group, replay, self.log)
            yield MinedGroup(group.trajectories, [trace for trace, _ in found], [scores for _, scores in found])

    def _groups_of(self, trajectories: Sequence[Trajectory], skip: Callable[[list[int]], bool]) -> Iterator[Group]:
        options = self.options
        return groups_of(trajectories, options.tokens_per_group, self.target.device, skip, options.shard)


@dataclass(frozen=True)
class Group:
    """B trajectories of similar length, padded on the right to T tokens."""

    indices: list[int]  # in the corpus
    trajectories: list[Trajectory]
    ids: torch.Tensor  # [B, T]

    @property
    def positions(self) -> torch.Tensor:
        """[B, T]"""
        return torch.arange(self.ids.shape[1], device=self.ids.device).expand(len(self.indices), -1)


def groups_of(
    trajectories: Sequence[Trajectory],
    tokens_per_group: int,
    device: torch.device,
    skip: Callable[[list[int]], bool] = lambda _indices: False,
    shard: Shard = WHOLE,
) -> Iterator[Group]:
    """The trajectories in groups of at most `tokens_per_group` tokens with padding (or of one). Deterministic.

    skip: of the indices of a group, which is not read then. shard: of the groups; they are those of the whole.
    """
    for indices in _indices_of(trajectories, tokens_per_group, shard):
        if skip(indices):
            continue
        members = [trajectories[i] for i in indices]
        yield Group(indices, members, pad_tokens(members, device))


def count_in(trajectories: Sequence[Trajectory], tokens_per_group: int, shard: Shard) -> int:
    """Trajectories in the groups of a shard."""
    return sum(map(len, _indices_of(trajectories, tokens_per_group, shard)))


def _indices_of(trajectories: Sequence[Trajectory], tokens_per_group: int, shard: Shard) -> Iterator[list[int]]:
    """The same groups whichever shard: what is computed of a group may depend, in its last bits, on its shape."""
    for number, indices in enumerate(groups_by_length(lengths_of(trajectories), tokens_per_group)):
        if shard.contains(number):
            yield indices


def _in_halves(group: Group, work: Callable[[Group], Sequence[Found]], log: Callable[[str], None]) -> list[Found]:
    """What `work` finds, one for each trajectory of the group; in two halves where the memory does not hold it.

    A row of a batch does not depend on the others: what is masked contributes nothing.
    """
    members = list(zip(group.indices, group.trajectories, strict=True))

    def of(some: Sequence[tuple[int, Trajectory]]) -> Sequence[Found]:
        if len(some) == len(members):
            return work(group)
        indices, trajectories = zip(*some, strict=True)
        return work(Group(list(indices), list(trajectories), pad_tokens(trajectories, group.ids.device)))

    return retry_in_halves(members, of, log)


def score(
    target: Target, trajectories: Sequence[Trajectory], traces: Sequence[Trace], tokens_per_group: int
) -> list[StepScores]:
    """Score the rejected proposals of some steps of each trajectory, in the trajectories' order."""
    scores: dict[int, StepScores] = {}
    tree_tokens = max(TREE_TOKENS, traces[0].proposed.shape[1] + 1) if traces else TREE_TOKENS
    for group in groups_of(trajectories, tokens_per_group, target.device):
        with torch.autocast(target.device.type, enabled=False):  # a training loop's is for the drafter alone
            out, cache = read(target, group, tree_tokens)
            of_group = [traces[i] for i in group.indices]
            found = score_traces(
                target, cache, out.hidden, of_group, ids=group.ids, tree_tokens=tree_tokens, rejected_only=True
            )
        scores |= dict(zip(group.indices, found, strict=True))
    return [scores[i] for i in range(len(trajectories))]


def read(
    target: Target, group: Group, tree_tokens: int, layer_ids: Sequence[int] = ()
) -> tuple[TargetOutput, SlotCache]:
    """The target's forward over a group, and its cache with `tree_tokens` free entries behind each trajectory."""
    B, T = group.ids.shape
    cache = target.new_cache(B, T + tree_tokens)
    return target.step(group.ids, group.positions, cache, slice(0, B), layer_ids=layer_ids), cache


@torch.no_grad()
def context_of(drafter: Drafter, features: torch.Tensor, group: Group) -> Context:
    """What the drafter knows of a group's trajectories, from the target's features [B, T, K*H]."""
    return drafter.encode(features, group.ids, group.positions)


def samples_proposals(drafter: Drafter, sampling: SamplingParams) -> bool:
    """Return whether its proposals for requests with this sampling are sampled from its q. Else they are argmaxes."""
    return drafter.samples_proposals and not sampling.greedy


def _with_outside(traces: Sequence[Trace], outside: Sequence[int]) -> list[Trace]:
    """The same with the number of tokens outside the nucleus."""
    return [replace(trace, outside_nucleus=count) for trace, count in zip(traces, outside, strict=True)]


@dataclass(frozen=True)
class _PreparedDrafter:
    """A drafter as it is replayed."""

    drafter: Drafter  # with packed weights, where there can be any
    head: Head
    block_size: int
    options: ReplayOptions

    @classmethod
    def of(cls, target: Target, drafter: Drafter, options: ReplayOptions) -> _PreparedDrafter:
        """To be made once for all groups: weights are packed here."""
        drafting = options.drafting
        head = drafter.drafting_head(target.head_weight, drafting.head_tokens).for_decoding(target)
        return cls(drafter.for_decoding(), head, drafting.block_size or drafter.block_size, options)

    def replay(self, target: Target, features: torch.Tensor, group: Group, hidden: torch.Tensor | None) -> list[Trace]:
        """Traces of a group from the target's features [B, T, K*H] and, where proposals are sampled, hidden states."""
        text, sampling = None, self.options.sampling
        if samples_proposals(self.drafter, sampling):
            assert hidden is not None
            text = TargetSampler.for_trajectories(target, hidden, group.trajectories, sampling, self.block_size - 1)
        return replay_chains(
            self.drafter,
            context_of(self.drafter, features, group),
            group.trajectories,
            self.block_size,
            self.head,
            self.options.chains,
            text=text,
            with_proposals=self.options.with_proposals,
        )


WRITTEN_EVERY_S = 30.0
_STEPS = ("anchors", "accepted", "proposed")  # arrays of a row a step; "expected" too, in all traces or none
_NUMBERS = ("length", "evaluated_blocks", "outside_nucleus")  # one a trace


class TraceCache:
    """The traces of some drafters on disk while a replay runs, so that an interrupted one goes on from there.

    Files of what the last half minute replayed: that is what a kill loses, and many short groups make few files. The
    folder is of this replay alone.
    """

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
            arrays[f"{d}.{field}"] = np.concatenate([getattr(trace, field) for trace in of_drafter])
        expected = [trace.expected for trace in of_drafter if trace.expected is not None]
        if expected:
            arrays[f"{d}.expected"] = np.concatenate(expected)
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
                    for field in (*_STEPS, "expected")
                    if f"{d}.{field}" in arrays
                }
                numbers = {field: arrays[f"{d}.{field}"] for field in _NUMBERS}
                for row, place in enumerate(traces):
                    steps: dict[str, Any] = {field: values[row] for field, values in columns.items()}
                    steps |= {field: int(values[row]) for field, values in numbers.items()}
                    traces[place][name] = Trace(**steps)
            return traces
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
