"""Metrics of the mined table over any division of the rows, and the counts of frequent values."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.tables.schemas import VERIFY_STEPS
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.replay.mined_table import MiningMetrics, ValueCounts
from draftsmith.stages.replay.replayer import MinedGroup
from draftsmith.stages.replay.step_tables import steps_table
from draftsmith.stages.replay.steps import AcceptanceStats, Steps
from tests.stages.bench import tau

K = 3


class Words:
    """Decodes an id to itself."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(str, ids))


def mined(count: int, seed: int = 0) -> MinedGroup:
    """Return a group of random steps with few different tokens, so that corrections repeat."""
    rng = np.random.default_rng(seed)
    group = []
    for index in range(count):
        tokens = rng.integers(0, 9, rng.integers(8, 30)).tolist()
        anchors, accepted, anchor = [], [], 4
        while anchor <= len(tokens) - 2:
            anchors.append(anchor)
            accepted.append(int(rng.integers(0, min(K, len(tokens) - 1 - anchor) + 1)))
            anchor += accepted[-1] + 1
        shape = (len(anchors), K)
        proposed = rng.integers(0, 9, shape)
        trace = Steps(len(tokens), np.array(anchors), np.array(accepted), proposed)
        logprobs = -rng.random(shape).astype(np.float32)
        logprobs[np.arange(K) >= trace.judged[:, None]] = np.nan
        best = np.where(trace.rejected_offset > 0, -rng.random(len(anchors)), np.nan).astype(np.float32)
        group.append(
            (Trajectory(f"p{index}/0", tokens, 4), replace(trace, target_logprobs=logprobs, best_logprob=best))
        )
    return group


def test_metrics_do_not_depend_on_how_rows_are_divided() -> None:
    table, rng = steps_table(VERIFY_STEPS, mined(60)), np.random.default_rng(1)
    whole, parts, start = MiningMetrics(K + 1), MiningMetrics(K + 1), 0
    whole.add(table)
    while start < table.num_rows:
        count = int(rng.integers(1, 90))
        parts.add(table.slice(start, count))
        start += count
    found = whole.summary(Words())
    assert parts.summary(Words()) == found
    rows = [row for row in table.to_pylist() if row["rejected_offset"]]
    pairs = Counter((row["proposed_ids"][row["accepted"]], row["committed_id"]) for row in rows)
    corrections = [(int(each["proposed"]), int(each["committed"])) for each in found["most_frequent_corrections"]]
    assert corrections == [pair for pair, _ in pairs.most_common(20)]  # of equal counts, the first one


def test_frequent_values_are_counted_over_batches() -> None:
    """Half of 20,000 values are a few that repeat; the others occur once each."""
    rng = np.random.default_rng(0)
    values = np.where(rng.random(20_000) < 0.5, rng.geometric(0.3, 20_000), 10**9 + np.arange(20_000))
    counted = ValueCounts()
    assert counted.most_common(20) == []
    for part in np.split(values, np.sort(rng.integers(0, 20_000, 60))):
        counted.add(part)
    assert counted.most_common(200) == Counter(values.tolist()).most_common(200)


def test_acceptance_stats_agree_with_the_traces() -> None:
    traces = [trace for _, trace in mined(25)]
    tally, order = AcceptanceStats(len(traces)), np.random.default_rng(0).permutation(len(traces))
    for part in np.split(order, [3, 11]):
        tally.add(part.tolist(), [traces[i] for i in part])
    assert tally.tau == tau(traces)
    assert tally.committed.tolist() == [trace.committed.sum() for trace in traces]
    assert tally.steps.tolist() == [len(trace.anchors) for trace in traces]
    for histogram, name in ((tally.accepted_at, "accepted"), (tally.judged_at, "judged")):
        values = np.concatenate([getattr(trace, name) for trace in traces])
        assert histogram.sum((0, 1)).tolist() == np.bincount(values, minlength=K + 1).tolist()
    assert tally.block_size == K + 1
    assert np.isnan(AcceptanceStats(0).tau)


def test_a_groups_table_takes_no_python_objects() -> None:
    """The rows of a group are Arrow's from the start: their bytes are a small multiple of the data's."""
    before = pa.total_allocated_bytes()
    table = steps_table(VERIFY_STEPS, mined(200))
    assert pa.total_allocated_bytes() - before < 400 * table.num_rows
