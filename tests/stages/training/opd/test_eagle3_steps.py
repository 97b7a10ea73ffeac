"""OPD's steps with an EAGLE-3 drafter: chains on its own proposals, trained as replay drafts them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from draftsmith.stages.training.blocks import draft_blocks, encode_batch, hidden_on_proposals
from draftsmith.stages.training.opd.anchor_sources import RandomAnchors, TableAnchors
from draftsmith.stages.training.opd.loss import opd_loss
from draftsmith.stages.training.opd.mined_table import sample_steps
from draftsmith.stages.training.opd.step import OpdStep
from draftsmith.stages.training.opd.verify_steps import verify_blocks
from tests.stages.bench import Bench
from tests.stages.training.case import heads_of, loss_context
from tests.stages.training.opd.world import INDICES, World, loss_of, make_world, phases


@pytest.fixture(scope="module")
def world(eagle_bench: Bench) -> World:
    return make_world(eagle_bench, moved_by=0.05)


def test_verify_steps_of_a_trainings_chains_equal_those_of_replay(world: World) -> None:
    """The trajectory's tokens decide what is accepted; proposals after a rejection are the drafter's own."""
    drafter, batch = world.moved, world.batch
    fresh = world.mined_by(drafter)
    steps_of_rows = [fresh.steps[i] for i in INDICES]
    anchors, expected = sample_steps(steps_of_rows, "visited", 30, phases(0, 1)[:, 0], torch.device("cpu"))
    context = encode_batch(drafter, batch)
    blocks = draft_blocks(drafter, context, batch, anchors)
    head, heads = world.head_of(drafter), heads_of(drafter, world.target)
    tokens = batch.tokens.gather(1, anchors.positions)
    own = drafter.propose(context, tokens, anchors.positions, drafter.block_size, head)
    steps = verify_blocks(blocks, heads, proposals=4, proposed=own)
    for name in ("accepted", "committed", "rejected_offset", "proposed"):
        assert torch.equal(getattr(steps, name), getattr(expected, name)), name
    scored = world.scored(steps, anchors, 4)
    torch.testing.assert_close(scored.target_logprobs, expected.target_logprobs, equal_nan=True, atol=3e-4, rtol=1e-4)
    without = verify_blocks(blocks, heads, proposals=4)
    for name in ("accepted", "committed", "rejected_offset"):
        assert torch.equal(getattr(without, name), getattr(expected, name)), name
    assert not torch.equal(without.proposed, expected.proposed), "on the trajectory's tokens it proposes others"
    small = verify_blocks(blocks, heads, proposals=2)
    assert torch.equal(small.accepted, steps.accepted.clamp(max=2))


def test_mining_again_gives_the_trace_of_the_current_weights(world: World) -> None:
    remining = world.remining(10, scored=True)
    metrics = remining.refresh(10, INDICES, world.view())
    fresh = world.mined_by(world.moved)
    for i in INDICES:
        for name in ("anchors", "accepted", "committed", "rejected_offset", "proposed"):
            ours, expected = getattr(remining.steps(i), name), getattr(fresh.steps[i], name)
            np.testing.assert_array_equal(ours, expected, err_msg=name)
    assert 0 < metrics["trace_changed_share"] < 1
    assert metrics["remined_trajectories"] == 3


def test_a_step_has_the_loss_of_the_chains_that_mining_finds(world: World) -> None:
    """Read from the table, or drafted, verified and scored in the step."""
    objective, many = world.objective("paper"), 30
    drafter, batch, fresh = world.moved, world.batch, world.mined_by(world.moved)
    steps_of_rows = [fresh.steps[i] for i in INDICES]
    anchors, steps = sample_steps(steps_of_rows, "errors", many, phases(5, 1)[:, 0], torch.device("cpu"))
    after_rejection = (steps.target_logprobs.isfinite().sum(-1) - 1)[steps.rejected_offset > 0]
    assert int(after_rejection.sum()) > 50, "scored proposals on the drafter's own prefix"

    context = encode_batch(drafter, batch)
    blocks = draft_blocks(drafter, context, batch, anchors)
    on_own = hidden_on_proposals(drafter, context, blocks, steps.proposed)
    loss_inputs = loss_context(heads_of(drafter, world.target), world.target)
    expected, on_trajectory = (
        opd_loss(replace(blocks, on_proposals=states), loss_inputs, objective, steps).metrics
        for states in (on_own, None)
    )
    assert abs(expected["loss_rejected"] - on_trajectory["loss_rejected"]) > 0.01

    class FixedAnchors(RandomAnchors):
        def sample(self, *arguments: Any) -> Any:
            return replace(super().sample(*arguments), anchors=anchors)

    remining = TableAnchors(fresh, drafter, "errors", many, every=0, scored=True)
    mined = world.source("errors", many, remining)
    for source in (FixedAnchors(many), mined):
        report = loss_of(world.step(source, objective), batch)
        for name in ("loss_response", "loss_rejected"):
            assert report.metrics[name] == pytest.approx(expected[name], rel=1e-3), name
        assert report.metrics.get("steps_changed_share", 0) == 0


@pytest.mark.parametrize("kind", ["successors", "random"])
def test_drafting_in_a_step_leaves_its_gradient_alone(kind: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient has the same bits as that of a step that is given its proposals."""
    objective = world.objective("paper")
    drafted: list[torch.Tensor] = []
    propose = OpdStep._propose

    def first_drafted(*arguments: Any) -> torch.Tensor:
        if not drafted:
            drafted.append(propose(*arguments))
        return drafted[0]

    monkeypatch.setattr(OpdStep, "_propose", first_drafted)
    gradients = []
    for _ in ("drafted in the step", "given"):
        with torch.autocast("cpu", torch.bfloat16):
            report = loss_of(world.step(world.source(kind), objective), world.batch)
        gradients.append(torch.autograd.grad(report.loss, list(world.moved.parameters())))
    for (name, _), a, b in zip(world.moved.named_parameters(), *gradients, strict=True):
        assert a.any(), name
        assert torch.equal(a, b), name
