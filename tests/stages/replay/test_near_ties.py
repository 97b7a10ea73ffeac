"""Steps that differ from replay's only by near-ties, on the test bed's drafters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from draftsmith.artifacts.tables.parquet import to_table
from draftsmith.artifacts.tables.schemas import TRACE
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import PreparedDrafter
from draftsmith.stages.replay import near_ties
from draftsmith.stages.replay.near_ties import are_near_best
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.parity import ParityTolerance, StepComparison
from draftsmith.stages.replay.replayer import Replayer
from tests.stages.bench import Bench

FLOAT32 = ParityTolerance("mining", float32=True, greedy=True, allowed=0.25)


@pytest.fixture(scope="module")
def prepared(bench: Bench) -> PreparedDrafter:
    return Replayer(bench.target, ReplayOptions()).prepare(bench.drafters["trained"])


def logits_at(bench: Bench, prepared: PreparedDrafter, answer: Trajectory, anchor: int) -> torch.Tensor:
    """Return the drafter's logits [K, V] after an anchor; its offsets do not depend on each other."""
    context, at = bench.read([answer], prepared.drafter)[1], torch.tensor([[anchor]])
    sampler = prepared.sampler(context, torch.tensor([[answer.tokens[anchor]]]), at)
    with torch.no_grad():
        return torch.stack([sampler.logits(at)[0, 0] for _ in range(prepared.block_size - 1)])


def walked(bench: Bench, prepared: PreparedDrafter, answer: Trajectory, other: tuple[int, int, int]) -> pa.Table:
    """Return the steps of an engine that proposes another token, (anchor, offset from 0, token), at one place."""
    rows: list[dict[str, Any]] = []
    anchor = answer.first_anchor
    while anchor <= answer.last_anchor:
        proposed = logits_at(bench, prepared, answer, anchor).argmax(-1).tolist()
        if anchor == other[0]:
            proposed[other[1]] = other[2]
        ahead = answer.tokens[anchor + 1 :]
        same = [a == b for a, b in zip(proposed, ahead, strict=False)]
        accepted = [*same, False].index(False)
        row = {"step": len(rows), "anchor": anchor, "accepted": accepted, "proposed_ids": proposed}
        rows.append({"trajectory_id": answer.trajectory_id, "target_logprobs": None, **row})
        anchor += accepted + 1
    return to_table(TRACE, rows)


@pytest.mark.shipped
def test_a_token_within_the_tie_explains_every_later_step(
    bench: Bench, prepared: PreparedDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second best proposal of the first block ends it earlier, so other anchors follow."""
    answer = bench.answered(1)[0]
    anchor = answer.first_anchor
    logits = logits_at(bench, prepared, answer, anchor)
    best = logits.topk(2)
    own = walked(bench, prepared, answer, (-1, 0, 0))
    served = walked(bench, prepared, answer, (anchor, 0, int(best.indices[0, 1])))
    apart = float(best.values[0, 0] - best.values[0, 1])
    assert served["anchor"].to_pylist() != own["anchor"].to_pylist() and apart > near_ties.TIE
    assert are_near_best(bench.target, prepared, answer, own)
    for tie, explained in ((1.01 * apart, True), (0.99 * apart, False)):
        monkeypatch.setattr(near_ties, "TIE", tie)
        assert are_near_best(bench.target, prepared, answer, served) is explained
        comparison = StepComparison(
            FLOAT32, near_ties.explained_by_ties(lambda: (bench.target, prepared), lambda _name: answer)
        )
        comparison.add(served, own)
        assert comparison.tied == ({answer.trajectory_id} if explained else set())
        if explained:
            assert comparison.check()["served_steps"] == 0


@pytest.mark.shipped
def test_no_tie_explains_missing_proposals_or_steps_that_verification_would_not_make(
    bench: Bench, prepared: PreparedDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_ties, "TIE", np.inf)
    answer = bench.answered(1)[0]
    rows = walked(bench, prepared, answer, (-1, 0, 0)).to_pylist()
    assert are_near_best(bench.target, prepared, answer, to_table(TRACE, rows))
    for place, changes in (
        (0, {"accepted": rows[0]["accepted"] + 1}),
        (1, {"anchor": rows[1]["anchor"] + 1}),
        (0, {"proposed_ids": rows[0]["proposed_ids"][:-1]}),
        (0, {"proposed_ids": []}),
    ):
        other = [{**row, **(changes if index == place else {})} for index, row in enumerate(rows)]
        assert not are_near_best(bench.target, prepared, answer, to_table(TRACE, other))
    assert not are_near_best(bench.target, prepared, answer, to_table(TRACE, rows[:-1]))
