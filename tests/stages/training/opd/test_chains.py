"""Chains of anchors: each round drafts at the right positions, and its loss equals drafting first and training then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter, PreparedDrafter
from draftsmith.stages.replay.chains import committed_tokens, draft
from draftsmith.stages.replay.sampled import TargetSampler
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.anchors import position_anchors
from draftsmith.stages.training.batches import Batch, FeatureSource, step_rng
from draftsmith.stages.training.config import OpdConfig, TrainingConfig
from draftsmith.stages.training.drafted_blocks import encode_batch
from draftsmith.stages.training.loss_registry import LossConfig
from draftsmith.stages.training.loss_report import LossReport
from draftsmith.stages.training.opd import step as opd_step
from draftsmith.stages.training.opd.anchor_sources import AnchorSource, ChainAnchors
from draftsmith.stages.training.opd.step import OpdStep, StepOptions
from draftsmith.stages.training.opd.verify_steps import StepAnchors
from tests.stages.training.case import hidden_of, whole_step
from tests.stages.training.opd.world import World
from tests.testbed import random_target
from tests.testbed.architectures import RANDOM
from tests.testbed.calls import recorded

CPU = torch.device("cpu")
ROUNDING = 1e-5  # float32, of the gradient's norm


# ---- where a round drafts


def answer(length: int) -> Trajectory:
    """An answer of this many tokens, whose first anchor is position 10."""
    return Trajectory("it", list(range(10 + length)), 10)


def following(
    row: Trajectory, drafted: Sequence[Sequence[int]], committed: Sequence[int], per_sequence: int, phase: float = 0.5
) -> list[int]:
    """Return the next round's anchors of a row, after anchors `drafted` in each round so far."""
    source = ChainAnchors(per_sequence)
    so_far = [torch.tensor([anchors]) for anchors in drafted]
    chosen = source.following([row], so_far, torch.tensor([committed]), np.full((1, source.numbers), phase))
    assert chosen.shape == (1, len(chosen[0]))
    found: list[int] = chosen[0].tolist()
    return found


def test_a_round_is_where_the_blocks_before_it_lead() -> None:
    assert following(answer(90), [[12, 40, 70]], [1, 4, 8], 12) == [13, 44, 78]
    assert following(answer(90), [[12, 40, 70], [13, 44, 78]], [3, 1, 2], 12) == [16, 45, 80]


def test_after_the_end_of_an_answer_comes_its_first_anchor() -> None:
    """Its last anchor is 98, the last position that a token follows: 99 is the end, however much was committed."""
    assert following(answer(90), [[40, 97]], [4, 1], 8) == [44, 98]
    assert following(answer(90), [[40, 97]], [4, 2], 8) == [10, 44]
    assert following(answer(90), [[40, 97]], [4, 9], 8) == [10, 44]


@pytest.mark.parametrize(
    ("drafted", "committed", "kept"),
    [
        ([[40, 42, 70]], [5, 3, 4], {45, 74}),  # two chains meet
        ([[40, 45, 70]], [5, 3, 4], {48, 74}),  # one comes to a block of another
        ([[10, 97, 98]], [1, 9, 9], {11}),  # and two to the first anchor, which has a block
    ],
)
def test_a_chain_that_meets_a_block_starts_anew(drafted: list[list[int]], committed: list[int], kept: set[int]) -> None:
    """At positions without a block, spread over the answer: over the shifts, at all of them."""
    others = set(range(10, 99)) - {*drafted[0], *kept}
    started: set[int] = set()
    for phase in np.linspace(0, 1, 200, endpoint=False):
        anchors = following(answer(90), drafted, committed, 12, phase)
        assert len(set(anchors)) == 3 and kept <= set(anchors)
        assert set(anchors) - kept <= others
        started |= set(anchors) - kept
    assert started == others


def test_an_answer_with_fewer_positions_than_blocks_has_some_twice() -> None:
    assert following(answer(6), [[10, 11, 12]], [1, 1, 1], 12) == [13, 14, 14]
    assert following(answer(5), [[10, 11, 12]], [1, 1, 1], 12) == [11, 13, 13]  # all have a block: all over it again
    assert following(answer(4), [[10, 11, 12]], [1, 1, 1], 12) == [10, 11, 12]


@pytest.mark.parametrize(
    ("count", "sizes"), [(16, [4, 4, 4, 4]), (6, [2, 2, 1, 1]), (11, [3, 3, 3, 2]), (3, [1, 1, 1]), (1, [1])]
)
def test_the_first_rounds_have_one_block_more_where_the_count_is_no_multiple(count: int, sizes: list[int]) -> None:
    """A smaller round follows only as many of the earlier chains, each of them equally often."""
    source = ChainAnchors(count)
    assert source.rounds == source.numbers == len(sizes)
    row, sample = answer(90), np.full((1, source.numbers), 0.5)
    drafted = [position_anchors([row], sizes[0], sample[:, 0], CPU)]
    while len(drafted) < source.rounds:
        committed = torch.ones_like(drafted[-1])
        drafted.append(source.following([row], drafted, committed, sample))
        assert set(drafted[-1][0].tolist()) <= set((drafted[-2] + 1)[0].tolist())
    assert [anchors.shape[1] for anchors in drafted] == sizes
    ends = {following(row, [[20, 40]], [1, 1], 5, phase)[0] for phase in (0.2, 0.7)}
    assert ends == {21, 41}


def test_a_rejected_stream_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"anchors.*loss\.rejected\.loss"):
        OpdConfig.model_validate({"anchors": "chains", "loss": "paper"})
    OpdConfig.model_validate({"anchors": "chains", "loss": {"preset": "paper", "rejected": {"weight": 0}}})


# ---- the loss of a step


class GivenAnchors(AnchorSource):
    """Anchors that were found before; it takes as many random numbers as chains."""

    numbers = 4

    def __init__(self, anchors: torch.Tensor):
        self.anchors = anchors

    def sample(self, *_: Any) -> StepAnchors:
        return StepAnchors(self.anchors)


@torch.no_grad()
def found_by_drafting(
    drafter: Drafter, target: Target, batch: Batch, per_sequence: int, sampler: TargetSampler | None
) -> list[torch.Tensor]:
    """Return the anchors of each round [B, a] of step 5, from blocks that are drafted for nothing else."""
    source = ChainAnchors(per_sequence)
    shifts = step_rng(0, 5).random((len(batch.trajectories), source.numbers))
    first = per_sequence // source.rounds + (per_sequence % source.rounds > 0)
    rounds = [position_anchors(batch.trajectories, first, shifts[:, 0], CPU)]
    prepared = PreparedDrafter(drafter, drafter.head_over(target.head_weight, None), drafter.block_size)
    tokens = committed_tokens(batch.trajectories, drafter.block_size - 1, CPU)
    while len(rounds) < source.rounds:
        context = encode_batch(drafter, batch)
        blocks = draft(prepared, context, tokens, rounds[-1], sampler, with_proposals=False)
        rounds.append(source.following(batch.trajectories, rounds, blocks.accepted + 1, shifts))
    return rounds


def assert_as_if_drafted_first(
    drafter: Drafter,
    target: Target,
    batch: Batch,
    loss: Any,
    monkeypatch: pytest.MonkeyPatch,
    sampling: SamplingParams = GREEDY,
) -> list[torch.Tensor]:
    """Compare a step of chains with one that trains the same blocks in one pass. Return the anchors of each round."""
    per_sequence, K = 10, drafter.block_size - 1
    sampler = None
    if not sampling.greedy:
        sampler = TargetSampler.for_trajectories(target, hidden_of(batch), batch.trajectories, sampling, K, salt=6)
    anchors = found_by_drafting(drafter, target, batch, per_sequence, sampler)
    config = TrainingConfig(anchors_per_sequence=per_sequence)
    objective = LossConfig.model_validate(loss).resolved(drafter.recipe, not sampling.greedy, sampling.temperature)
    options = StepOptions(config, objective, K, sampling)
    indices = list(range(len(batch.trajectories)))

    def trained(source: AnchorSource) -> tuple[LossReport, torch.Tensor]:
        drafter.zero_grad(set_to_none=True)
        step = OpdStep(drafter, target, source, options)
        (report,) = step.micro_batches(5, whole_step(indices, batch), step_rng(0, 5))
        report.loss.backward()
        return report, torch.cat([p.grad.flatten() for p in drafter.parameters() if p.grad is not None])

    expected, gradient = trained(GivenAnchors(torch.cat(anchors, 1)))
    drafted, encoded = (recorded(monkeypatch, opd_step, name) for name in ("draft_blocks", "encode_batch"))
    report, of_chains = trained(ChainAnchors(per_sequence))
    assert len(encoded) == 1
    for (*_, at), found in zip(drafted, anchors, strict=True):
        assert torch.equal(at, found)
    assert float(report.loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    assert float((of_chains - gradient).norm() / gradient.norm()) < ROUNDING
    assert (report.blocks, report.positions) == (expected.blocks, expected.positions)
    assert report.operations == pytest.approx(expected.operations)
    assert report.metrics == pytest.approx(expected.metrics, rel=1e-5)
    return anchors


LOSSES = {
    "matched": {},
    "whole blocks, D-PACE": {"response": {"scope": "block", "positions": {"kind": "d_pace"}}},
    "only committed": {"response": {"scope": "committed", "beyond": 0}},
    "the paper's response": {"preset": "paper", "rejected": {"loss": "none"}},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_what_drafting_first_and_training_then_gives(
    loss: str, any_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of trained drafters, parallel and autoregressive: most rounds are where proposals were accepted."""
    world = any_world
    rounds = assert_as_if_drafted_first(world.moved, world.target, world.batch, LOSSES[loss], monkeypatch)
    ahead = (rounds[1][:, :2] - rounds[0][:, :2]).numpy()
    assert (ahead > 1).any()


@pytest.mark.parametrize("kind", ["dflash2", "dspark"])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(1.0), SamplingParams(0.8, 0.9, 40)], ids=str)
def test_sampled_proposals_lead_where_the_sampler_says(
    kind: str, sampling: SamplingParams, plain_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, trajectories = RANDOM[kind](plain_target), random_target.trajectories(4, seed=8)
    batch = FeatureSource(plain_target, drafter.target_layer_ids, trajectories, TrainingConfig()).batch(range(4))
    assert_as_if_drafted_first(drafter, plain_target, batch, "matched", monkeypatch, sampling)
