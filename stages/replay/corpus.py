"""Replay of a whole set of trajectories, in groups of similar length that the target reads in one forward each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from draftsmith.stages.contract import WHOLE, Shard
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.drafters.head import Head
from draftsmith.stages.law import GREEDY, Law
from draftsmith.stages.memory import in_halves
from draftsmith.stages.replay.chains import replay_chains
from draftsmith.stages.replay.drawn import SampledText
from draftsmith.stages.replay.kept import KeptTraces
from draftsmith.stages.replay.nucleus import outside_nucleus
from draftsmith.stages.replay.portions import TREE_TOKENS
from draftsmith.stages.replay.scoring import StepScores, score_traces
from draftsmith.stages.replay.trace import Trace, Trajectory, groups_by_length, pad_tokens
from draftsmith.stages.replay.trajectories import lengths_of
from draftsmith.stages.targets.causal_lm import Target, TargetOutput
from draftsmith.stages.targets.slots import SlotCache

Found = TypeVar("Found")
Replayed: TypeAlias = tuple[list[int], list[dict[str, Trace]]]  # places in the corpus, and traces by drafter of each
Progress = Callable[[int, int], Any]  # trajectories done, and in all; called after every group


def quietly(_done: int, _total: int) -> None:
    """Nobody asked."""


def _say_nothing(_line: str) -> None:
    """Nobody listens."""


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
        if shard.takes(number):
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

    return in_halves(members, of, log)


def replay_all(
    target: Target,
    drafters: Mapping[str, Drafter],
    trajectories: Sequence[Trajectory],
    drafting: DraftingConfig | None = None,
    **settings: Any,
) -> dict[str, list[Trace]]:
    """Traces of every drafter, in the order of the trajectories. settings: as of `replay_groups`.

    All traces are in memory at once: for figures of many trajectories there is `tally_all`.
    """
    traces: dict[int, dict[str, Trace]] = {}
    for places, found in replay_groups(target, drafters, trajectories, drafting, **settings):
        traces |= dict(zip(places, found, strict=True))
    return {name: [traces[i][name] for i in range(len(trajectories))] for name in drafters}


def replay_groups(
    target: Target,
    drafters: Mapping[str, Drafter],
    trajectories: Sequence[Trajectory],
    drafting: DraftingConfig | None = None,
    *,
    law: Law = GREEDY,
    chains: int | None = None,
    with_proposals: bool = True,
    tokens_per_group: int = 4096,
    progress: Progress = quietly,
    kept: Path | None = None,
    done: Sequence[Path] = (),
    shard: Shard = WHOLE,
    log: Callable[[str], None] = _say_nothing,
) -> Iterator[Replayed]:
    """Traces of every drafter, some trajectories at a time. The target reads each trajectory once.

    drafting: left out, as each drafter was trained. law: that the texts were drawn with; it decides about the proposals
    of drafters that draw them (`Drafter.draws`). chains, with_proposals: as in `replay_chains`. kept: a folder of this
    replay alone, in which an interrupted one finds what it has done. done: such folders of others, with shards of the
    same.
    """
    drafting = drafting or DraftingConfig()
    layer_ids = sorted({layer for d in drafters.values() for layer in d.target_layer_ids})
    ready = {name: _Ready.of(target, drafter, drafting) for name, drafter in drafters.items()}

    def replay(group: Group) -> list[dict[str, Trace]]:
        hidden, outside = None, [0] * len(group.trajectories)
        if any(draws(drafter, law) for drafter in drafters.values()):
            out = target.read(group.ids, layer_ids)
            features, hidden = out.features, out.hidden
            outside = outside_nucleus(target, hidden, group.trajectories, law)
            assert features is not None
        else:
            features = target.features(group.ids, layer_ids)
        by_layer = dict(zip(layer_ids, features.chunk(len(layer_ids), -1), strict=True))
        found = {}
        for name, each in ready.items():
            features = torch.cat([by_layer[k] for k in each.drafter.target_layer_ids], -1)
            traces = each.replay(
                target, features, group, chains, hidden, law, with_proposals=with_proposals, with_logprobs=False
            )
            found[name] = _with_outside(traces, outside)
        return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]

    yield from traces_of(
        trajectories,
        list(drafters),
        replay,
        tokens_per_group,
        target.device,
        progress=progress,
        kept=kept,
        done=done,
        shard=shard,
        log=log,
    )


def traces_of(
    trajectories: Sequence[Trajectory],
    names: Sequence[str],
    make: Callable[[Group], list[dict[str, Trace]]],
    tokens_per_group: int,
    device: torch.device,
    *,
    progress: Progress = quietly,
    kept: Path | None = None,
    done: Sequence[Path] = (),
    shard: Shard = WHOLE,
    log: Callable[[str], None] = _say_nothing,
) -> Iterator[Replayed]:
    """What `make` finds of every group of the shard, and before that what is `kept` of an interrupted run, or `done` by
    others. Each trajectory once.

    names: the drafters that `make` finds traces of.
    """
    there = np.zeros(len(trajectories), dtype=bool)
    store = KeptTraces(kept, names) if kept is not None else None
    for folder in (*((store,) if store is not None else ()), *(KeptTraces(folder, names) for folder in done)):
        for places, found in folder.read():
            new = [row for row, place in enumerate(places) if not there[place]]
            there[places] = True
            yield [places[row] for row in new], [found[row] for row in new]
    total = count_in(trajectories, tokens_per_group, shard)
    try:
        for group in groups_of(trajectories, tokens_per_group, device, lambda each: bool(there[each].all()), shard):
            found = _in_halves(group, make, log)
            if store is not None:
                store.add(group.indices, {name: [each[name] for each in found] for name in names})
            new = [row for row, place in enumerate(group.indices) if not there[place]]
            there[group.indices] = True
            yield [group.indices[row] for row in new], [found[row] for row in new]
            progress(int(there.sum()), total)
    finally:
        if store is not None:
            store.flush()


@dataclass(frozen=True)
class Mined:
    """The traces of one group, and what the target said of every proposal."""

    trajectories: list[Trajectory]
    traces: list[Trace]  # with the drafter's log-probs
    scores: list[StepScores]


def mine(
    target: Target,
    drafter: Drafter,
    trajectories: Sequence[Trajectory],
    drafting: DraftingConfig | None = None,
    *,
    law: Law = GREEDY,
    chains: int | None = None,
    top_k: int = 8,
    tokens_per_group: int = 8192,
    tree_tokens: int = TREE_TOKENS,
    finished: Callable[[list[int]], bool] = lambda _indices: False,
    shard: Shard = WHOLE,
    log: Callable[[str], None] = _say_nothing,
) -> Iterator[Mined]:
    """Replay and score group by group, leaving out those that are `finished`, of which it is asked by their indices.

    The target reads a group once: its hidden states serve the drafter and the proposals up to the first rejection, its
    key/value cache those behind it. law: as in `replay_groups`. top_k: of the target's best tokens at each rejection.
    tree_tokens: rejected proposals of a trajectory that one forward scores.
    """
    drafting = drafting or DraftingConfig()
    ready = _Ready.of(target, drafter, drafting)
    tree_tokens = max(tree_tokens, drafting.block_size or drafter.block_size)

    def replay(group: Group) -> list[tuple[Trace, StepScores]]:
        out, cache = read(target, group, tree_tokens, drafter.target_layer_ids)
        assert out.features is not None
        traces = ready.replay(
            target, out.features, group, chains, out.hidden, law, with_proposals=True, with_logprobs=True
        )
        if draws(drafter, law):
            traces = _with_outside(traces, outside_nucleus(target, out.hidden, group.trajectories, law))
        scores = score_traces(target, cache, out.hidden, traces, ids=group.ids, top_k=top_k, tree_tokens=tree_tokens)
        return list(zip(traces, scores, strict=True))

    for group in groups_of(trajectories, tokens_per_group, target.device, finished, shard):
        found = _in_halves(group, replay, log)
        yield Mined(group.trajectories, [trace for trace, _ in found], [scores for _, scores in found])


def score(
    target: Target, trajectories: Sequence[Trajectory], traces: Sequence[Trace], tokens_per_group: int
) -> list[StepScores]:
    """What the target says of the rejected proposals of some steps of each trajectory, in the trajectories' order."""
    scores: dict[int, StepScores] = {}
    tree_tokens = max(TREE_TOKENS, traces[0].proposed.shape[1] + 1) if traces else TREE_TOKENS
    for group in groups_of(trajectories, tokens_per_group, target.device):
        with torch.autocast(target.device.type, enabled=False):  # a training loop's is for the drafter alone
            out, cache = read(target, group, tree_tokens)
            of_group = [traces[i] for i in group.indices]
            found = score_traces(
                target,
                cache,
                out.hidden,
                of_group,
                ids=group.ids,
                top_k=1,
                tree_tokens=tree_tokens,
                rejected_only=True,
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


def draws(drafter: Drafter, law: Law) -> bool:
    """Are its proposals for requests of this law drawn from its q, and verified with it? Else they are argmaxes."""
    return drafter.draws and not law.greedy


def _with_outside(traces: Sequence[Trace], outside: Sequence[int]) -> list[Trace]:
    """The same with the number of tokens outside the nucleus."""
    return [replace(trace, outside_nucleus=count) for trace, count in zip(traces, outside, strict=True)]


@dataclass(frozen=True)
class _Ready:
    """A drafter as it is replayed."""

    drafter: Drafter  # with packed weights, where there can be any
    head: Head
    block_size: int

    @classmethod
    def of(cls, target: Target, drafter: Drafter, drafting: DraftingConfig) -> _Ready:
        """To be made once for all groups: weights are packed here."""
        head = drafter.drafting_head(target.head_weight, drafting.head_tokens).for_decoding(target)
        return cls(drafter.for_decoding(), head, drafting.block_size or drafter.block_size)

    def replay(
        self,
        target: Target,
        features: torch.Tensor,
        group: Group,
        chains: int | None,
        hidden: torch.Tensor | None,
        law: Law,
        *,
        with_proposals: bool,
        with_logprobs: bool,
    ) -> list[Trace]:
        """Traces of a group from the target's features [B, T, K*H] and, where proposals are drawn, hidden states."""
        text = None
        if draws(self.drafter, law):
            assert hidden is not None
            text = SampledText.of(target, hidden, group.trajectories, law, self.block_size - 1)
        return replay_chains(
            self.drafter,
            context_of(self.drafter, features, group),
            group.trajectories,
            self.block_size,
            self.head,
            chains,
            text=text,
            with_proposals=with_proposals,
            with_logprobs=with_logprobs,
        )
