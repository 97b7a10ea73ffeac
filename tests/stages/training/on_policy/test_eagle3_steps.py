"""OPD's steps with an EAGLE-3 drafter: chains on its own proposals, trained as replay drafts them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from draftsmith.stages.training.batches import step_rng
from draftsmith.stages.training.blocks import block_hidden, block_hidden_on, context_of
from draftsmith.stages.training.on_policy.loss import opd_loss
from draftsmith.stages.training.on_policy.mined import draw_steps
from draftsmith.stages.training.on_policy.remining import Remining
from draftsmith.stages.training.on_policy.sources import RandomAnchors
from draftsmith.stages.training.on_policy.step import OpdStep
from tests.stages.bench import Bench
from tests.stages.training.case import CHUNK, heads_of
from tests.stages.training.world import INDICES, World, make_world, phases


@pytest.fixture(scope="module")
def world(eagle_bench: Bench) -> World:
    return make_world(eagle_bench, moved_by=0.05)


def test_a_step_has_the_loss_of_the_chains_that_mining_finds(world: World) -> None:
    """Read from the table, or drafted, judged and scored in the step: proposals, scores and the states behind them."""
    objective, many = world.objective("paper"), 30
    drafter, batch, fresh = world.moved, world.batch, world.mined_by(world.moved)
    known = [fresh.steps[i] for i in INDICES]
    anchors, steps = draw_steps(known, "errors", many, phases(5, 1)[:, 0], torch.device("cpu"))
    judged_behind = (steps.target_logprobs.isfinite().sum(-1) - 1)[steps.rejected_offset > 0]
    assert int(judged_behind.sum()) > 50, "proposals behind a rejection, on the drafter's own prefix"

    context, target_head = context_of(drafter, batch), world.target.head_weight
    hidden = block_hidden(drafter, context, batch, anchors)
    on_own = block_hidden_on(drafter, context, batch, anchors, steps.proposed)
    heads = heads_of(drafter, world.target)
    expected, on_trajectory = (
        opd_loss(
            hidden, batch, anchors, steps, heads, target_head, objective, on_proposals=states, positions_per_chunk=CHUNK
        ).figures
        for states in (on_own, None)
    )
    assert abs(expected["loss_rejected"] - on_trajectory["loss_rejected"]) > 0.01

    class There(RandomAnchors):
        def draw(self, *arguments: Any) -> Any:
            return replace(super().draw(*arguments), anchors=anchors)

    remining = Remining(fresh, drafter, every=0, scored=True)
    mined = world.source("errors", many, remining)
    for source in (There(many), mined):
        report = world.step(source, objective).loss(5, INDICES, batch, step_rng(0, 5))
        for name in ("loss_response", "loss_rejected"):
            assert report.figures[name] == pytest.approx(expected[name], rel=1e-3), name
        assert report.figures.get("steps_changed_share", 0) == 0


@pytest.mark.parametrize("kind", ["successors", "random"])
def test_drafting_in_a_step_leaves_its_gradient_alone(kind: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for its own proposals: bit for bit the gradient of a step that is handed the proposals ready-made."""
    objective = world.objective("paper")
    drafted: list[torch.Tensor] = []
    propose = OpdStep._propose

    def remembered(*arguments: Any) -> torch.Tensor:
        if not drafted:
            drafted.append(propose(*arguments))
        return drafted[0]

    monkeypatch.setattr(OpdStep, "_propose", remembered)
    gradients = []
    for _ in ("drafted in the step", "ready-made"):
        with torch.autocast("cpu", torch.bfloat16):
            report = world.step(world.source(kind), objective).loss(5, INDICES, world.batch, step_rng(0, 5))
        gradients.append(torch.autograd.grad(report.loss, list(world.moved.parameters())))
    for (name, _), a, b in zip(world.moved.named_parameters(), *gradients, strict=True):
        assert a.any(), name
        assert torch.equal(a, b), name
