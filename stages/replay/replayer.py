"""Replays and mines a set of trajectories, in groups of similar length with one forward of the target each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypedDict, TypeVar, Unpack

import numpy as np
import torch

from draftsmith.artifacts.tables.parquet import BufferedShards, read_table, shard_paths
from draftsmith.artifacts.tables.schemas import REPLAYED
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter, PreparedDrafter
from draftsmith.stages.replay.chains import replay_chains, with_confidence
from draftsmith.stages.replay.groups import Group, count_in, encode_group, group_indices, tree_tokens_of
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.sampled import TargetSampler, outside_nucleus, samples_proposals
from draftsmith.stages.replay.scoring import score_traces
from draftsmith.stages.replay.steps import AcceptanceStats, Steps
from draftsmith.stages.runtime.memory import retry_in_halves
from draftsmith.stages.targets.causal_lm import Target

Result = TypeVar("Result")
GroupTraces: TypeAlias = tuple[list[int], list[dict[str, Steps]]]  # indices in the set, each one's traces by drafter
MinedGroup: TypeAlias = list[tuple[Trajectory, Steps]]  # scored


class TraceConsumer(Protocol):
    """Takes every trace once."""

    def add(self, indices: Sequence[int], traces: Sequence[Steps]) -> None:
        """Take the traces of the trajectories `indices`."""


def do_nothing(*_: Any) -> None:
    """Ignore progress, or a line of the log."""


class ReplaySettings(TypedDict, total=False):
    """The keyword arguments of `Replayer.groups`."""

    progress: Callable[[int, int], Any]
    cache: Path | None
    shards: Sequence[Path]


class Replayer:
    """Replays drafters on trajectories. The target reads each trajectory once for all of them."""

    def __init__(
        self, target: Target, options: ReplayOptions | None = None, log: Callable[[str], None] = do_nothing
    ) -> None:
        """Share one target. log: takes a line when a group is halved because memory was refused."""
        self.target, self.options, self.log = target, options or ReplayOptions(), log

    def traces(
        self, drafters: Mapping[str, Drafter], trajectories: Sequence[Trajectory], **settings: Unpack[ReplaySettings]
    ) -> dict[str, list[Steps]]:
        """Return the traces of every drafter, in the order of the trajectories. settings: same as in `groups`.

        All traces are in memory together; use `acceptance` for the metrics of many trajectories.
        """
        traces: dict[int, dict[str, Steps]] = {}
        for indices, by_drafter in self.groups(drafters, trajectories, **settings):
            traces |= dict(zip(indices, by_drafter, strict=True))
        return {name: [traces[i][name] for i in range(len(trajectories))] for name in drafters}

    def acceptance(
        self,
        drafters: Mapping[str, Drafter],
        trajectories: Sequence[Trajectory],
        *,
        also: Mapping[str, TraceConsumer] | None = None,
        **settings: Unpack[ReplaySettings],
    ) -> dict[str, AcceptanceStats]:
        """Return the acceptance of every drafter, without keeping the traces.

        also: takes the traces of a drafter too. settings: same as in `groups`.
        """
        stats = {name: AcceptanceStats(len(trajectories)) for name in drafters}
        for indices, by_drafter in self.groups(drafters, trajectories, **settings):
            for name, acceptance in stats.items():
                traces = [trace[name] for trace in by_drafter]
                acceptance.add(indices, traces)
                if also and name in also:
                    also[name].add(indices, traces)
        return stats

    def groups(
        self,
        drafters: Mapping[str, Drafter],
        trajectories: Sequence[Trajectory],
        *,
        progress: Callable[[int, int], Any] = do_nothing,
        cache: Path | None = None,
        shards: Sequence[Path] = (),
    ) -> Iterator[GroupTraces]:
        """Yield the traces of every drafter, a few trajectories at a time, each trajectory once.

        progress: takes the numbers of finished and of all trajectories, after every group.
        cache: a folder for only this replay, from which it resumes after an interruption.
        shards: caches of other processes that replayed shards of the same set.
        """
        options = self.options
        layer_ids = sorted({layer for d in drafters.values() for layer in d.target_layer_ids})
        prepared = {name: self.prepare(drafter) for name, drafter in drafters.items()}
        any_samples = any(samples_proposals(drafter, options.sampling) for drafter in drafters.values())

        def replay(group: Group) -> list[dict[str, Steps]]:
            hidden, outside = None, [0] * len(group.trajectories)
            if any_samples:
                read = self.target.read(group.ids, layer_ids)
                hidden, features = read.hidden, read.features
                assert features is not None
                outside = outside_nucleus(self.target, hidden, group.trajectories, options.sampling)
            else:
                features = self.target.features(group.ids, layer_ids)
            by_layer = dict(zip(layer_ids, features.chunk(len(layer_ids), -1), strict=True))
            traces = {}
            for name, drafter in prepared.items():
                features = torch.cat([by_layer[k] for k in drafter.drafter.target_layer_ids], -1)
                traces[name] = _with_outside(self._replay(drafter, features, group, hidden), outside)
            return [dict(zip(traces, row, strict=True)) for row in zip(*traces.values(), strict=True)]

        finished = np.zeros(len(trajectories), dtype=bool)

        def unfinished(indices: list[int], by_drafter: list[dict[str, Steps]]) -> GroupTraces:
            new = [row for row, index in enumerate(indices) if not finished[index]]
            finished[indices] = True
            return [indices[row] for row in new], [by_drafter[row] for row in new]

        total = count_in(trajectories, options.tokens_per_group, options.shard)
        with nullcontext() if cache is None else TraceCache(cache) as own_cache:  # renames what is damaged
            for folder in [*([] if cache is None else [cache]), *shards]:
                for indices, by_drafter in stored_traces(folder):
                    yield unfinished(indices, by_drafter)
            for indices in group_indices(trajectories, options.tokens_per_group, options.shard):
                if finished[indices].all():
                    continue
                by_drafter = self._in_halves(trajectories, indices, replay)
                if own_cache is not None:
                    own_cache.add_group(indices, by_drafter)
                yield unfinished(indices, by_drafter)
                progress(int(finished.sum()), total)

    def mine(
        self,
        drafter: Drafter,
        trajectories: Sequence[Trajectory],
        *,
        suffixes: bool = True,
        finished: Callable[[list[int]], bool] = lambda _indices: False,
    ) -> Iterator[MinedGroup]:
        """Replay and score group by group.

        The target reads a group once: its hidden states serve the drafter and the proposals up to the first rejection.
        suffixes: score the proposals after it too, on the key/value cache of that read.
        finished: takes the indices of a group; groups for which it returns True are skipped.
        """
        sampling = self.options.sampling
        prepared = self.prepare(drafter)
        tree_tokens = tree_tokens_of(prepared.block_size) if suffixes else 0

        def replay(group: Group) -> MinedGroup:
            encoded = encode_group(self.target, group.ids, drafter.target_layer_ids, tree_tokens)
            assert encoded.features is not None
            traces = self._replay(prepared, encoded.features, group, encoded.hidden)
            if samples_proposals(drafter, sampling):
                outside = outside_nucleus(self.target, encoded.hidden, group.trajectories, sampling)
                traces = _with_outside(traces, outside)
            return list(zip(group.trajectories, score_traces(self.target, encoded, traces), strict=True))

        for indices in group_indices(trajectories, self.options.tokens_per_group, self.options.shard):
            if not finished(indices):
                yield self._in_halves(trajectories, indices, replay)

    def _in_halves(
        self, trajectories: Sequence[Trajectory], indices: list[int], work: Callable[[Group], Sequence[Result]]
    ) -> list[Result]:
        """Return the results of `work`, one per trajectory of a group; in two halves if memory is refused.

        A row of a batch does not depend on the others, because masked entries contribute nothing.
        """

        def work_on(part: Sequence[int]) -> Sequence[Result]:
            return work(Group.padded([trajectories[i] for i in part], self.target.device))

        return retry_in_halves(indices, work_on, self.log)

    def prepare(self, drafter: Drafter) -> PreparedDrafter:
        """Return the drafter ready for replay, with packed weights where possible. Call it once for all groups."""
        drafting = self.options.drafting
        block_size = drafting.block_size or drafter.block_size
        return PreparedDrafter.packed(drafter, self.target, drafting.head_tokens, block_size)

    def _replay(
        self, drafter: PreparedDrafter, features: torch.Tensor, group: Group, hidden: torch.Tensor | None
    ) -> list[Steps]:
        """Return the traces of a group.

        features: [B, T, K*H] of the target; hidden: [B, T, H] of the target, where proposals are sampled.
        """
        sampler, options = None, self.options
        if samples_proposals(drafter.drafter, options.sampling):
            assert hidden is not None
            sampler = TargetSampler.for_trajectories(
                self.target, hidden, group.trajectories, options.sampling, drafter.block_size - 1
            )
        with torch.no_grad():
            context = drafter.drafter.encode(features, group.ids, group.positions)
        traces = replay_chains(
            drafter,
            context,
            group.trajectories,
            options.chains,
            sampler=sampler,
            with_proposals=options.with_proposals,
        )
        if options.with_confidence and drafter.drafter.has_confidence:
            return with_confidence(drafter, context, group.trajectories, traces)
        return traces


def _with_outside(traces: Sequence[Steps], outside: Sequence[int]) -> list[Steps]:
    """Return the traces with the number of tokens outside the nucleus."""
    return [replace(trace, outside_nucleus=count) for trace, count in zip(traces, outside, strict=True)]


_WAITING = 1 << 12  # trajectories


class TraceCache(BufferedShards):
    """Stores the traces of a replay on disk while it runs, so that an interrupted one continues from there.

    The folder is only for this replay.
    """

    def __init__(self, folder: Path):
        super().__init__(folder, {"traces": REPLAYED}, most=_WAITING)

    def add_group(self, indices: Sequence[int], traces: Sequence[dict[str, Steps]]) -> None:
        """Add a group's traces, by drafter for each trajectory. They are on disk after a while."""
        rows = [
            {
                "index": index,
                "drafter": name,
                "length": trace.length,
                "proposals": trace.proposed.shape[1],
                "evaluated_blocks": trace.evaluated_blocks,
                "outside_nucleus": trace.outside_nucleus,
                "anchors": trace.anchors,
                "accepted": trace.accepted,
                "proposed": trace.proposed.ravel(),
                "expected": trace.expected,
                "confidence": None if trace.confidence is None else trace.confidence.ravel(),
            }
            for index, by_drafter in zip(indices, traces, strict=True)
            for name, trace in by_drafter.items()
        ]
        self.add({"traces": rows}, len(indices))


def stored_traces(folder: Path) -> Iterator[GroupTraces]:
    """Yield the traces in the folder of a `TraceCache`, a file at a time."""
    for path in shard_paths(folder / "traces"):
        traces: dict[int, dict[str, Steps]] = {}
        table = read_table(path, REPLAYED)
        columns = zip(*table.columns, strict=True)
        for index, drafter, length, proposals, blocks, outside, *steps, expected, confidence in columns:
            anchors, accepted, proposed = (column.values.to_numpy().astype(np.int64) for column in steps)
            traces.setdefault(index.as_py(), {})[drafter.as_py()] = Steps(
                length.as_py(),
                anchors,
                accepted,
                proposed.reshape(-1, proposals.as_py()),
                expected=expected.values.to_numpy() if expected.is_valid else None,
                confidence=confidence.values.to_numpy().reshape(-1, proposals.as_py()) if confidence.is_valid else None,
                evaluated_blocks=blocks.as_py(),
                outside_nucleus=outside.as_py(),
            )
        yield list(traces), list(traces.values())
