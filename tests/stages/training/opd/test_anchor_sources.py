"""Verify steps of the current weights: mined again, found on the training's own blocks, or their successors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from draftsmith.stages.drafters.base import PreparedDrafter
from draftsmith.stages.replay.chains import draft, successors
from draftsmith.stages.replay.groups import tree_tokens_of
from draftsmith.stages.replay.sampled import VerifiedBlocks
from draftsmith.stages.training.anchors import position_anchors
from draftsmith.stages.training.batches import FeatureSource
from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.drafted_blocks import draft_blocks, encode_batch, hidden_on_proposals
from draftsmith.stages.training.loss_registry import LossConfig
from draftsmith.stages.training.opd import step as opd_step
from draftsmith.stages.training.opd import verify_steps
from draftsmith.stages.training.opd.anchor_sources import RandomAnchors, TableAnchors
from draftsmith.stages.training.opd.step import opd_loss, opd_response
from draftsmith.stages.training.opd.verify_steps import (
    StepAnchors,
    sample_steps,
    score_steps,
    verify_blocks,
)
from tests.benchmarks.proof import scrambled
from tests.stages.kernel_flops import KERNEL_FLOPS
from tests.stages.training.case import heads_of, loss_context
from tests.stages.training.opd.world import (
    COUNT,
    INDICES,
    KINDS,
    PER_SEQUENCE,
    World,
    loss_of,
    shifts,
    without_errors,
)
from tests.testbed.calls import recorded


def test_mining_again_gives_the_trace_of_the_current_weights(any_world: World) -> None:
    world = any_world
    remining = world.remining(scored=True)
    metrics = remining.refresh(10, INDICES, world.view())
    traces = world.traces(world.moved)
    gone, total = world.steps_gone(), sum(len(world.table.steps_of(i)) for i in INDICES)
    for i in INDICES:
        fresh, trace = remining.steps(i), traces[i]
        for name in ("anchors", "accepted", "committed", "rejected_offset", "proposed"):
            np.testing.assert_array_equal(getattr(fresh, name), getattr(trace, name), err_msg=name)
    assert 0 < gone < total
    assert metrics == {"trace_changed_share": gone / total, "remined_trajectories": 3}
    for i in set(range(COUNT)) - set(INDICES):
        assert remining.steps(i) is world.table.steps_of(i)
    assert remining.mined.steps_of(INDICES[0]) is world.table.steps_of(INDICES[0])


def test_only_sampled_steps_are_scored(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rejected proposals, once each; steps of the mined table keep their scores."""
    calls = recorded(monkeypatch, verify_steps, "score")
    remining = world.remining(every=10, scored=True)
    remining.refresh(10, INDICES[:2], world.view(INDICES[:2]))  # the third keeps its trace
    source = world.source("visited", remining=remining)
    sampled = source.sample(9, INDICES, world.view(), shifts(0, 1))  # too early for the third
    assert sampled.steps is not None and list(sampled.unscored) == [0, 1]
    (scored,) = score_steps([(world.batch.trajectories, sampled)], world.target, 7, 2048)
    logprobs = scored.known_steps.logprobs
    assert not scored.unscored
    fresh = world.mined_by(world.moved)
    for row, i in enumerate(INDICES):
        table = (fresh if row < 2 else world.table).steps_of(i)
        for a, anchor in enumerate(sampled.anchors[row].tolist()):
            index = table.anchors.tolist().index(anchor)
            expected = table.logprobs[index]
            np.testing.assert_allclose(logprobs[row, a].numpy(), expected, atol=1e-4)
            accepted = table.accepted[index]
            assert np.isnan(expected[:accepted]).all()
            assert np.isfinite(expected[accepted : accepted + 1]).all() or not table.rejected_offset[index]
    ((_, _, traces, *_),) = calls
    assert len(traces) == 2
    assert all(len(t) == len(set(t.anchors.tolist())) <= PER_SEQUENCE for t in traces)


def test_a_trajectory_is_mined_again_when_its_trace_is_old_enough(world: World) -> None:
    remining = world.remining(every=10)
    mined = {}
    for step, indices in ((0, [0, 1]), (9, [0, 1]), (10, [0]), (15, [0, 1]), (19, [0, 1]), (20, [0, 1])):
        metrics = remining.refresh(step, indices, world.view(indices))
        mined[step] = metrics.get("remined_trajectories", 0)
    assert mined == {0: 0, 9: 0, 10: 1, 15: 1, 19: 0, 20: 1}  # 0 at 10 and 20, 1 at 15
    never = world.remining(every=0)
    assert never.refresh(1000, [0], world.view([0])) == {}


@pytest.mark.parametrize("scored", [False, True])
def test_a_checkpoint_restores_the_fresh_steps(scored: bool, world: World) -> None:
    empty = world.remining()
    empty.load_state_dict(world.remining().state_dict())
    assert [empty.steps(i) for i in range(COUNT)] == [world.table.steps_of(i) for i in range(COUNT)]
    remining = world.remining(scored=scored)
    remining.refresh(10, INDICES, world.view())
    other = world.remining(scored=scored)
    other.refresh(12, [1], world.view([1]))  # overwritten
    other.load_state_dict(remining.state_dict())
    for i in range(COUNT):
        for name, value in vars(remining.steps(i)).items():
            np.testing.assert_array_equal(value, getattr(other.steps(i), name), err_msg=name)
    for step, again in ((19, 0), (20, 3)):
        metrics = other.refresh(step, INDICES, world.view())
        assert metrics.get("remined_trajectories", 0) == again


def test_fresh_steps_fit_a_smaller_served_block(world: World) -> None:
    """A table that was mined with a smaller block is mined again with that block; batches are padded."""
    table = replace(world.table, proposals=3)
    remining = TableAnchors(table, world.moved, "visited", 1, every=1, scored=True)
    remining.refresh(1, [0], world.view([0]))
    fresh, trace = remining.steps(0), world.traces(world.moved, 4)[0]
    np.testing.assert_array_equal(fresh.accepted, trace.accepted)
    assert fresh.proposed.shape == (len(trace), 3)
    K = world.moved.block_size - 1
    sampled = sample_steps([fresh], "visited", 4, np.array([0.5]), K, torch.device("cpu"))
    assert sampled.logprobs.isnan().all()
    assert sampled.proposed.shape == (1, 4, K) and not sampled.proposed[..., 3:].any()
    rejected = dict(zip(trace.anchors.tolist(), trace.rejected_offset.tolist(), strict=True))
    assert sampled.rejected_offset[0].tolist() == [rejected[anchor] for anchor in sampled.anchors[0].tolist()]


def test_verify_steps_of_a_trainings_blocks_equal_those_of_replay(any_world: World) -> None:
    """At the anchors of its trace, the steps are the trace; and so are the target's log-probs.

    The trajectory's tokens decide what is accepted. Of an autoregressive drafter, proposals after a rejection are its
    own if they are given.
    """
    world, drafter, batch, K = any_world, any_world.moved, any_world.batch, any_world.table.proposals
    fresh = world.mined_by(drafter)
    traces, device = [fresh.steps_of(i) for i in INDICES], torch.device("cpu")
    expected = sample_steps(traces, "visited", 30, shifts(0, 1)[:, 0], K, device)
    anchors = expected.anchors
    context, heads = encode_batch(drafter, batch), heads_of(drafter, world.target)
    blocks, at = draft_blocks(drafter, context, batch, anchors), anchors
    without = verify_blocks(blocks, heads, proposals=K)
    own = drafter.propose(context, batch.tokens.gather(1, at), at, drafter.block_size, world.head_of(drafter))
    steps = verify_blocks(blocks, heads, proposals=K, proposed=own) if drafter.autoregressive else without
    for name in ("accepted", "committed", "rejected_offset"):
        assert torch.equal(getattr(steps, name), getattr(expected, name)), name
        assert torch.equal(getattr(without, name), getattr(expected, name)), name
    assert torch.equal(steps.proposed, expected.proposed)
    assert torch.equal(without.proposed, expected.proposed) is not drafter.autoregressive
    assert steps.logprobs.isnan().all()
    scored, atol = world.scored(steps, K), 3e-4 if drafter.autoregressive else 1e-4
    torch.testing.assert_close(scored.logprobs, expected.logprobs, equal_nan=True, atol=atol, rtol=1e-4)
    small = verify_blocks(blocks, heads, proposals=2)
    assert torch.equal(small.accepted, steps.accepted.clamp(max=2))
    in_parts = world.scored(steps, K, tokens=1)
    torch.testing.assert_close(in_parts.logprobs, scored.logprobs, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert world.scored(small, 2).logprobs[..., 2:].isnan().all()


def test_successors_are_where_one_block_of_the_current_weights_leads(world: World) -> None:
    """From positions all over the answer; a successor of two of them is an anchor once, and another one twice."""
    per_sequence, view = 8, world.view()
    source = world.source("successors", per_sequence)
    on_trace = 0
    traces = world.traces(world.moved)
    for step in range(10):
        sampled = source.sample(step, INDICES, view, shifts(step, 2))
        assert sampled.steps is None  # found on the blocks of the step itself
        assert sampled.anchors.numel() == len(INDICES) * per_sequence
        before = position_anchors(view.batch.trajectories, per_sequence, shifts(step, 2)[:, 0], torch.device("cpu"))
        following = successors(
            PreparedDrafter(world.moved, view.head, 8),
            view.context,
            view.batch.trajectories,
            before,
            None,
        ).numpy()
        for row, i in enumerate(INDICES):
            chosen = sampled.anchors[row].tolist()
            assert set(chosen) == set(following[row].tolist())
            on_trace += sum(anchor in traces[i].anchors for anchor in chosen)
    by_chance = float(np.mean([len(traces[i].anchors) / world.trajectories[i].answer_length for i in INDICES]))
    assert on_trace / (10 * len(INDICES) * per_sequence) > 1.5 * by_chance


def test_every_kind_trains_the_same_number_of_blocks(world: World) -> None:
    """Also where a trajectory has fewer candidates than anchors."""
    many, everywhere = 200, world.objective({"response": {"scope": "block"}})
    positions = {}
    for kind in KINDS:
        remining = world.remining(every=1 if kind == "visited" else 0)
        step = world.step(world.source(kind, many, remining=remining), everywhere, per_sequence=many)
        report = loss_of(step, world.batch)
        assert report.blocks == len(INDICES) * many, kind
        positions[kind] = report.positions / (report.blocks * 7)
    assert min(positions.values()) > 0.6  # the rest lies beyond the ends: more of it where errors are late


@pytest.mark.parametrize("proposals", [7, 3])
@pytest.mark.parametrize(("kind", "response", "verified"), [
    ("random", {"scope": "block"}, 0), ("random", {"scope": "committed"}, 0), ("random", {"beyond": 0}, 1),
    ("successors", {"scope": "block"}, 0), ("successors", {}, 0), ("successors", {"beyond": 0}, 1),
    ("chains", {"scope": "block"}, 0), ("chains", {}, 0), ("chains", {"beyond": 0}, 4), ("visited", {"beyond": 0}, 0),
])  # fmt: skip
def test_blocks_are_verified_only_if_the_loss_needs_it(
    kind: str, response: dict[str, Any], verified: int, proposals: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If all offsets are trained, the loss itself finds what was accepted, with the same weights."""
    calls = recorded(monkeypatch, opd_step, "verify_blocks")
    source = world.source(kind, remining=world.remining())
    step = world.step(source, world.objective({"response": response}), proposals=proposals)
    batch = world.batch
    loss = loss_of(step, batch).loss
    assert len(calls) == verified
    monkeypatch.setattr(LossConfig, "reads_steps", property(lambda _objective: True))
    assert torch.equal(loss, loss_of(step, batch).loss)


def test_a_trajectory_without_errors_gives_its_other_steps(world: World) -> None:
    steps, right = world.table.steps_of(0), without_errors(world.table, 0).steps_of(0)
    sampled = sample_steps([right], "errors", PER_SEQUENCE, np.array([0.3]), 7, torch.device("cpu"))
    assert sampled.anchors.numel() == PER_SEQUENCE
    assert set(sampled.anchors.flatten().tolist()) <= set(steps.anchors.tolist())
    assert (sampled.rejected_offset == 0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_mining_in_a_step_leaves_its_gradient_alone(autocast: bool, world: World) -> None:
    """Autocast caches its copies of weights: none made without gradient may reach the training."""
    batch, objective = world.batch, world.objective("matched")
    mined_before = world.remining(every=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mined_before.refresh(5, INDICES, world.view())
    gradients = []
    for remining in (mined_before, world.remining(every=1)):  # the second mines inside the step
        step = world.step(world.source("visited", remining=remining), objective)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            report = loss_of(step, batch)
        gradients.append(torch.autograd.grad(report.loss, list(world.moved.parameters()), allow_unused=True))
    for (name, _), a, b in zip(world.moved.named_parameters(), *gradients, strict=True):
        assert a is not None and b is not None, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["errors", "random", "successors"])
def test_the_target_scores_proposals_only_for_a_rejected_stream(
    kind: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = recorded(monkeypatch, world.target, "step")
    for loss, wanted in (("matched", False), ("paper", True), ({"preset": "paper", "rejected": {"weight": 0}}, False)):
        objective = world.objective(loss)
        remining = world.remining(every=1, scored=objective.needs_scores)
        step = world.step(world.source(kind, remining=remining), objective)
        forwards.clear()
        report = loss_of(step, world.batch)
        assert bool(forwards) == wanted
        assert ("loss_rejected" in report.metrics) == wanted
        assert report.loss.isfinite()


@pytest.mark.parametrize("kind", ["errors", "successors"])
def test_the_target_reads_only_proposals_that_the_loss_reads(
    kind: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a limited stream; the mined table has all scores."""
    forwards = recorded(monkeypatch, world.target, "step")
    read, trained = [], []
    for offsets in (None, 2, 1):
        objective = world.objective({"preset": "paper", "rejected": {"offsets": offsets}})
        for every in (0, 1):
            source = world.source(kind, remining=world.remining(every=every, scored=True))
            forwards.clear()
            trained.append(loss_of(world.step(source, objective), world.batch).positions)
        read.append(sum(ids.numel() for ids, *_ in forwards))
    assert read[0] > read[1] > read[2]  # the last: only the answers
    assert trained[0] > trained[2] > trained[4] and trained[1] > trained[3] > trained[5]


@pytest.mark.parametrize("indices", [INDICES, [4, 0, 4]], ids=["each once", "one twice"])
def test_proposals_are_scored_on_the_keys_of_the_first_read(indices: list[int], world: World) -> None:
    """The target then reads an answer once a step; kept, if they fit, where the features of all answers do not."""
    config = TrainingConfig(feature_memory_mb=features_mb(world) - 1e-3, tokens_per_target_forward=200)
    source = FeatureSource(
        world.target, world.moved.target_layer_ids, world.trajectories, config, tree_tokens=tree_tokens_of(8)
    )
    batch = source.batch(indices)
    assert [len(names) for names, _ in batch.kept] != []
    anchors = position_anchors(batch.trajectories, PER_SEQUENCE, np.full(len(indices), 0.5), torch.device("cpu"))
    drafter = scrambled(world.moved)  # its proposals are rejected, whatever the target
    blocks = draft_blocks(drafter, encode_batch(drafter, batch), batch, anchors)
    steps = verify_blocks(blocks, heads_of(drafter, world.target), proposals=7)
    unscored = StepAnchors(anchors, steps, unscored=range(len(indices)))
    found, operations = [], []
    for kept in ((), batch.kept):
        with FlopCounterMode(display=False, custom_mapping=KERNEL_FLOPS) as counter:
            (scored,) = score_steps([(batch.trajectories, unscored)], world.target, 7, 200, kept)
            found.append(scored.known_steps.logprobs)
        operations.append(counter.get_total_flops())
    assert found[0].isfinite().any()
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4, equal_nan=True)
    with FlopCounterMode(display=False, custom_mapping=KERNEL_FLOPS) as counter:
        source._read_all(list(dict.fromkeys(indices)))
    assert operations[0] - operations[1] > 0.9 * counter.get_total_flops()

    for megabytes in (2 * features_mb(world), 1e-3):  # of no use, and no room
        config = TrainingConfig(feature_memory_mb=megabytes)
        source = FeatureSource(world.target, world.moved.target_layer_ids, world.trajectories, config, tree_tokens=512)
        assert not source.batch(indices).kept


def features_mb(world: World) -> float:
    """Return the megabytes of the features of all answers."""
    width = world.target.info.hidden_size * (len(world.moved.target_layer_ids) + 1)
    return sum(len(t.tokens) for t in world.trajectories) * width * world.target.dtype.itemsize / 2**20


# ---- an autoregressive drafter: chains on its own proposals, trained as replay drafts them


def test_a_step_has_the_loss_of_the_chains_that_mining_finds(eagle_world: World) -> None:
    """Read from the table, or drafted, verified and scored in the step."""
    world = eagle_world
    objective, many = world.objective("paper"), 30
    drafter, batch, fresh = world.moved, world.batch, world.mined_by(world.moved)
    traces, K, device = [fresh.steps_of(i) for i in INDICES], drafter.block_size - 1, torch.device("cpu")
    steps = sample_steps(traces, "errors", many, shifts(5, 1)[:, 0], K, device)
    anchors = steps.anchors
    after_rejection = (steps.logprobs.isfinite().sum(-1) - 1)[steps.rejected_offset > 0]
    assert int(after_rejection.sum()) > 50, "scored proposals on the drafter's own prefix"

    context = encode_batch(drafter, batch)
    blocks = draft_blocks(drafter, context, batch, anchors)
    on_own = hidden_on_proposals(drafter, context, blocks, steps.proposed)
    loss_inputs = loss_context(heads_of(drafter, world.target), world.target)
    response = opd_response(blocks, loss_inputs, objective, steps)
    expected, on_trajectory = (
        opd_loss(response, replace(blocks, on_proposals=states), loss_inputs, objective, steps).metrics
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
def test_drafting_in_a_step_leaves_its_gradient_alone(
    kind: str, eagle_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient has the same bits as in a step that is given its proposals."""
    world = eagle_world
    objective = world.objective("paper")
    drafted: list[VerifiedBlocks] = []

    def first_drafted(*arguments: Any) -> VerifiedBlocks:
        if not drafted:
            drafted.append(draft(*arguments))
        return drafted[0]

    monkeypatch.setattr(opd_step, "draft", first_drafted)
    gradients = []
    for _ in ("drafted in the step", "given"):
        with torch.autocast("cpu", torch.bfloat16):
            report = loss_of(world.step(world.source(kind), objective), world.batch)
        gradients.append(torch.autograd.grad(report.loss, list(world.moved.parameters())))
    for (name, _), a, b in zip(world.moved.named_parameters(), *gradients, strict=True):
        assert a.any(), name
        assert torch.equal(a, b), name
