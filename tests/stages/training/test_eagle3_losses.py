"""Training of EAGLE-3 against loops: the training-time test, chains on its own proposals, the head that is its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
from draftsmith.stages.replay.sequential import replay_sequentially
from draftsmith.stages.replay.trace import Trace, Trajectory
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.anchors import draw_evenly, draw_randomly
from draftsmith.stages.training.batches import FeatureSource, step_rng
from draftsmith.stages.training.blocks import LossReport, View, block_hidden, block_hidden_on, context_of
from draftsmith.stages.training.chunked import chunked_values
from draftsmith.stages.training.config import SftConfig, TrainingConfig
from draftsmith.stages.training.loss_config import LossConfig
from draftsmith.stages.training.on_policy.loss import opd_loss
from draftsmith.stages.training.on_policy.mined import Kind, MinedTable, TrajectorySteps
from draftsmith.stages.training.on_policy.remining import Remining
from draftsmith.stages.training.on_policy.sources import (
    AnchorSource,
    RandomAnchors,
    RollingAnchors,
    SuccessorAnchors,
    TableAnchors,
)
from draftsmith.stages.training.on_policy.step import OpdStep
from draftsmith.stages.training.on_policy.verify_steps import VerifySteps, judge, score, with_scores
from draftsmith.stages.training.supervised import sft_loss
from draftsmith.stages.training.vocabulary import Heads, HeadSource
from tests.stages.bench import Bench
from tests.stages.training.case import CHUNK, Case, K, hidden_of, make_case
from tests.stages.training.on_policy.test_loss import differentiable
from tests.stages.training.test_losses import plain_bernoulli, plain_k3
from tests.testbed.eagle3 import random_eagle3

TOLERANCE = 1e-4  # of a loss; the drafter computes in float32


@pytest.fixture
def eagle(plain_target: Target) -> Eagle3Drafter:
    """One whose gradients the test may take."""
    return random_eagle3(plain_target)


@pytest.fixture(scope="module")
def eagle_case(plain_target: Target, plain_eagle3: Eagle3Drafter) -> Case:
    """The batch of the other tests with this drafter's features; the proposals are its own tokens, but for a few."""
    case = make_case(plain_target, plain_eagle3.target_layer_ids)
    draw = torch.Generator().manual_seed(5)
    shape = case.steps.proposed.shape
    own = plain_eagle3.draft_tokens[torch.randint(0, plain_eagle3.draft_tokens.numel(), shape, generator=draw)]
    kept = torch.rand(shape, generator=draw) < 0.8
    steps = VerifySteps(**(vars(case.steps) | {"proposed": torch.where(kept, own, case.steps.proposed)}))
    return replace(case, steps=steps)


def heads_of(drafter: Drafter, target: Target) -> Heads:
    return HeadSource(drafter, target.head_weight, TrainingConfig()).draw(np.random.default_rng(0), [])


@dataclass
class Slow:
    """The drafter's and the target's distributions one chain at a time, float64 behind the hidden states."""

    case: Case
    drafter: Eagle3Drafter
    target: Target

    @property
    def tokens(self) -> list[int]:
        ids: list[int] = self.drafter.draft_tokens.tolist()
        return ids

    def log_q(self, row: int, anchor: int, following: list[int]) -> torch.Tensor:
        """[K, V'] with gradient, on `following` tokens behind the anchor; the context ends at the anchor."""
        batch, before = self.case.batch, (slice(row, row + 1), slice(anchor))
        context = self.drafter.encode(batch.features[before], batch.tokens[before], batch.positions[before])
        chain = [self.case.trajectories[row].tokens[anchor], *following][:K]
        chain += [0] * (K - len(chain))  # beyond the end of the trajectory: nothing is read there
        hidden = self.drafter.block_hidden(context, torch.tensor([[chain]]), torch.tensor([[anchor]]))[0, 0]
        return torch.log_softmax((hidden @ self.drafter.lm_head.weight.T).double(), -1)

    def log_p(self, row: int, position: int, temperature: float) -> torch.Tensor:
        """[V'] of the token at `position` over the draft vocabulary."""
        return torch.log_softmax(self._logits(row, position)[self.tokens] / temperature, -1)

    def token_log_p(self, row: int, position: int, token: int) -> float:
        """Over all tokens."""
        return float(torch.log_softmax(self._logits(row, position), -1)[token])

    def _logits(self, row: int, position: int) -> torch.Tensor:
        return (self.target.head_weight @ hidden_of(self.case.batch)[row, position - 1]).double()


def assert_equal(report: LossReport, slow: torch.Tensor, drafter: Drafter) -> None:
    """Same value and same gradient in every parameter, none of which is zero."""
    torch.testing.assert_close(report.loss.detach().double(), slow.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    parameters = list(drafter.parameters())
    fast = torch.autograd.grad(report.loss, parameters)
    for (name, _), a, b in zip(drafter.named_parameters(), fast, torch.autograd.grad(slow, parameters), strict=True):
        scale = float(b.abs().max())
        assert scale > 1e-5, name
        assert float((a - b).abs().max()) <= 1e-3 * scale + 1e-6, name


# ---- SFT


def sft(case: Case, drafter: Drafter, target: Target, temperature: float = 1.0, chunk: int = CHUNK) -> LossReport:
    return sft_loss(
        drafter,
        case.batch,
        case.anchors,
        heads_of(drafter, target),
        target.head_weight,
        SftConfig().stream(drafter.recipe),
        temperature=temperature,
        positions_per_chunk=chunk,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_training_time_test_equals_the_loop(
    temperature: float, eagle_case: Case, eagle: Eagle3Drafter, plain_target: Target
) -> None:
    """Forward KL to the target's law over the draft vocabulary, 0.8 a step, on the trajectory's own tokens."""
    report = sft(eagle_case, eagle, plain_target, temperature)
    slow = Slow(eagle_case, eagle, plain_target)
    total, weights, positions, correct, left_out = torch.zeros((), dtype=torch.float64), 0.0, 0, 0, 0
    for row, _, anchor in eagle_case.blocks():
        sequence = eagle_case.trajectories[row].tokens
        log_q = slow.log_q(row, anchor, sequence[anchor + 1 :])
        for k in range(1, min(K, len(sequence) - 1 - anchor) + 1):
            label = sequence[anchor + k]
            if label not in slow.tokens:
                left_out += 1
                continue
            log_p = slow.log_p(row, anchor + k, temperature)
            weight = 0.8 ** (k - 1)
            total = total + weight * (log_p.exp() * (log_p - log_q[k - 1])).sum()
            weights += weight
            positions += 1
            correct += slow.tokens[int(log_q[k - 1].argmax())] == label
    assert left_out > 5
    assert_equal(report, total / weights, eagle)
    assert (report.blocks, report.positions) == (len(eagle_case.blocks()), positions)
    assert report.figures["accuracy"] == pytest.approx(correct / positions)


def test_the_recipe_is_the_authors() -> None:
    stream = SftConfig().stream(Eagle3Drafter.recipe)
    assert (stream.loss, stream.scope) == ("forward_kl", "block")
    assert math.exp(-1 / stream.weights().gamma) == pytest.approx(0.8)
    chosen = SftConfig(loss="cross_entropy", gamma=2.0).stream(Eagle3Drafter.recipe)
    assert (chosen.loss, chosen.weights().gamma) == ("cross_entropy", 2.0)


def test_the_heads_are_over_the_draft_vocabulary_and_the_drafters_is_trained(
    plain_eagle3: Eagle3Drafter, plain_target: Target
) -> None:
    """Options that sample a part of the vocabulary are for drafters without a head of their own."""
    config = TrainingConfig(head_tokens=5, head_negatives=2)
    heads = HeadSource(plain_eagle3, plain_target.head_weight, config).draw(
        np.random.default_rng(0), [torch.arange(64)]
    )
    assert heads.trained
    assert heads.drafter.weight is plain_eagle3.lm_head.weight
    for head in (heads.drafter, heads.target):
        assert head.token_ids is not None
        assert torch.equal(head.token_ids, plain_eagle3.draft_tokens)
    assert torch.equal(heads.target.weight, plain_target.head_weight[plain_eagle3.draft_tokens])
    assert not heads.target.weight.requires_grad


# ---- OPD


OBJECTIVES: dict[str, Any] = {
    "matched": "matched",
    "paper": "paper",
    "forward KL, rejected stream of another weight": {
        "response": {"loss": "forward_kl", "scope": "block", "weight": 0.5},
        "rejected": {"loss": "k3", "weight": 2.0, "positions": {"kind": "power", "delta": 0.5}},
    },
}


def opd(case: Case, drafter: Drafter, target: Target, objective: LossConfig, chunk: int = CHUNK) -> LossReport:
    context = context_of(drafter, case.batch)
    return opd_loss(
        block_hidden(drafter, context, case.batch, case.anchors),
        case.batch,
        case.anchors,
        case.steps,
        heads_of(drafter, target),
        target.head_weight,
        objective,
        on_proposals=block_hidden_on(drafter, context, case.batch, case.anchors, case.steps.proposed),
        positions_per_chunk=chunk,
    )


def slow_opd(slow: Slow, objective: LossConfig) -> tuple[torch.Tensor, int]:
    """The loss, and how many positions have one."""
    case = slow.case
    response, response_weights = torch.zeros((), dtype=torch.float64), 0.0
    rejected, rejected_weights = torch.zeros((), dtype=torch.float64), 0.0
    trained: set[tuple[int, int, int]] = set()
    for row, index, anchor in case.blocks():
        sequence = case.trajectories[row].tokens
        log_q = slow.log_q(row, anchor, sequence[anchor + 1 :])
        reached = min(K, len(sequence) - 1 - anchor)
        if objective.response.scope == "committed":
            reached = min(reached, int(case.steps.committed[row, index]))
        for k in range(1, reached + 1):
            if (label := sequence[anchor + k]) not in slow.tokens:
                continue
            column = slow.tokens.index(label)
            if objective.response.loss == "forward_kl":
                log_p = slow.log_p(row, anchor + k, objective.temperature or 0.0)
                term = (log_p.exp() * (log_p - log_q[k - 1])).sum()
            elif objective.response.loss == "bernoulli_kl":
                term = differentiable(plain_bernoulli, log_q[k - 1, column], slow.token_log_p(row, anchor + k, label))
            else:
                term = -log_q[k - 1, column]
            weight = 0.8 ** (k - 1) if objective.response.scope == "block" else 1.0  # of whole chains, as in SFT
            response, response_weights = response + weight * term, response_weights + weight
            trained.add((row, index, k))
        proposed = case.steps.proposed[row, index].tolist()
        on_own = slow.log_q(row, anchor, proposed)
        first = int(case.steps.rejected_offset[row, index])
        for k in range(first, K + 1) if first and objective.needs_scores else ():
            log_p_of_it = float(case.steps.target_logprobs[row, index, k - 1])
            if math.isnan(log_p_of_it) or proposed[k - 1] not in slow.tokens:
                continue
            weight = objective.rejected.positions.delta ** (k - 1)
            column = slow.tokens.index(proposed[k - 1])
            rejected = rejected + weight * differentiable(plain_k3, on_own[k - 1, column], log_p_of_it)
            rejected_weights += weight
            trained.add((row, index, k))
    loss = objective.response.weight * response / response_weights
    if objective.needs_scores:
        loss = loss + objective.rejected.weight * rejected / rejected_weights
    return loss, len(trained)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_opd_loss_equals_the_loop(name: str, eagle_case: Case, eagle: Eagle3Drafter, plain_target: Target) -> None:
    """The response stream on the trajectory's tokens, the rejected one on the drafter's own."""
    objective = LossConfig.model_validate(OBJECTIVES[name]).resolved(Eagle3Drafter.recipe, False, 0.0)
    report = opd(eagle_case, eagle, plain_target, objective)
    slow, positions = slow_opd(Slow(eagle_case, eagle, plain_target), objective)
    assert_equal(report, slow, eagle)
    assert (report.blocks, report.positions) == (len(eagle_case.blocks()), positions)


def test_the_rejected_stream_depends_on_the_chain_that_was_drafted(
    eagle_case: Case, eagle: Eagle3Drafter, plain_target: Target
) -> None:
    """On the trajectory's tokens it would be another loss."""
    objective = LossConfig.model_validate("paper").resolved(Eagle3Drafter.recipe, False, 0.0)
    own = opd(eagle_case, eagle, plain_target, objective).figures["loss_rejected"]
    hidden = block_hidden(eagle, context_of(eagle, eagle_case.batch), eagle_case.batch, eagle_case.anchors)
    heads = heads_of(eagle, plain_target)
    arguments = (eagle_case.batch, eagle_case.anchors, eagle_case.steps, heads, plain_target.head_weight, objective)
    on_trajectory = opd_loss(hidden, *arguments, positions_per_chunk=CHUNK).figures["loss_rejected"]
    assert abs(own - on_trajectory) > 0.01


@pytest.mark.parametrize("loss", ["sft", "paper"])
def test_the_size_of_the_chunks_changes_nothing(
    loss: str, eagle_case: Case, eagle: Eagle3Drafter, plain_target: Target
) -> None:
    objective = LossConfig.model_validate("paper").resolved(Eagle3Drafter.recipe, False, 0.0)
    gradients = []
    for chunk in (1, CHUNK, 1000):
        case = (eagle_case, eagle, plain_target)
        report = sft(*case, chunk=chunk) if loss == "sft" else opd(*case, objective, chunk=chunk)
        gradients.append((report.loss.detach(), *torch.autograd.grad(report.loss, list(eagle.parameters()))))
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_without_a_token_of_the_draft_vocabulary_trains_nothing_and_does_no_harm(
    eagle_case: Case, eagle: Eagle3Drafter, plain_target: Target
) -> None:
    """Such a batch may come up where the vocabulary is small and the anchors are few."""
    outside = next(t for t in range(64) if t not in eagle.draft_tokens.tolist())
    tokens = torch.full_like(eagle_case.batch.tokens, outside)
    report = sft(replace(eagle_case, batch=replace(eagle_case.batch, tokens=tokens)), eagle, plain_target)
    assert (float(report.loss.detach()), report.positions) == (0.0, 0)
    report.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in eagle.parameters())


# ---- values by chunks behind a head that is trained


N, H, V = 11, 6, 9
GENERATOR = torch.Generator().manual_seed(0)
HEAD, LABELS = torch.randn(V, H, generator=GENERATOR), torch.randint(0, V, (N,), generator=GENERATOR)
INPUT, MIX = torch.randn(N, H, generator=GENERATOR), torch.randn(H, H, generator=GENERATOR)


def values_behind(head: torch.Tensor) -> Callable[[torch.Tensor, slice], torch.Tensor]:
    return lambda hidden, part: torch.nn.functional.cross_entropy(hidden @ head.T, LABELS[part], reduction="none")


@pytest.mark.parametrize("chunk", [1, 3, N, 100])
def test_chunks_behind_a_trained_head_equal_the_whole(chunk: int) -> None:
    """Values, the gradient of what is before the head and of the head, behind a weight of each row."""
    found = []
    for chunked in (True, False):
        mix, head = MIX.clone().requires_grad_(), HEAD.clone().requires_grad_()
        hidden, values_of = (INPUT @ mix).tanh(), values_behind(head)
        values = (
            chunked_values(hidden, chunk, values_of, trained_head=True) if chunked else values_of(hidden, slice(0, N))
        )
        loss = 0.37 * (torch.arange(1.0, N + 1) * values).sum() / 5 + (mix * mix).sum() + (head * head).sum()
        loss.backward()
        found.append((values.detach(), mix.grad, head.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_no_positions_behind_a_trained_head_give_no_values_and_a_zero_gradient() -> None:
    hidden, head = torch.zeros(0, H, requires_grad=True), HEAD.clone().requires_grad_()
    values = chunked_values(hidden, 4, values_behind(head), trained_head=True)
    values.sum().backward()
    assert (values.shape, values.dtype) == ((0,), torch.float32)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, H)


def test_without_gradients_only_the_values_are_computed() -> None:
    head = HEAD.clone().requires_grad_()
    with torch.no_grad():
        values = chunked_values(INPUT, 4, values_behind(head), trained_head=True)
    assert not values.requires_grad
    torch.testing.assert_close(values, values_behind(HEAD)(INPUT, slice(0, N)))


# ---- verify steps of the current weights, and whole steps of OPD


COUNT, PER_SEQUENCE = 6, 5
INDICES = [4, 0, 3]


@dataclass(frozen=True)
class World:
    """Greedy answers mined with the trained drafter, and a drafter whose weights have moved since."""

    bench: Bench
    moved: Drafter
    trajectories: list[Trajectory]
    table: MinedTable
    features: FeatureSource

    def traces(self, drafter: Drafter) -> list[Trace]:
        """One chain after the other."""
        head = drafter.head_over(self.bench.target.head_weight, None)
        return [
            replay_sequentially(drafter, self.bench.read([t], drafter)[1], t, drafter.block_size, head)
            for t in self.trajectories
        ]

    def mined_by(self, drafter: Drafter) -> MinedTable:
        traces = self.traces(drafter)
        scores = score(self.bench.target, self.trajectories, traces)
        steps = [
            TrajectorySteps(t.anchors, t.accepted, t.committed, t.rejected_offset, t.proposed, s.target_logprobs)
            for t, s in zip(traces, scores, strict=True)
        ]
        return MinedTable(steps, drafter.block_size - 1)

    def view(self) -> View:
        batch = self.features.batch(INDICES)
        head = self.moved.head_over(self.bench.target.head_weight, None)
        return View(batch, context_of(self.moved, batch), head)

    def remining(self, every: int, scored: bool) -> Remining:
        return Remining(self.table, self.moved, self.bench.target, every=every, scored=scored)

    def source(self, kind: str) -> AnchorSource:
        if kind == "successors":
            return SuccessorAnchors(self.table, self.moved, PER_SEQUENCE, draw_evenly)
        if kind == "random":
            return RandomAnchors(PER_SEQUENCE, draw_evenly)
        if kind == "rolling":
            return RollingAnchors(self.table, PER_SEQUENCE, draw_evenly)
        table: Kind = "errors" if kind == "errors" else "visited"
        return TableAnchors(self.remining(0, scored=True), table, PER_SEQUENCE, draw_evenly)

    def step(self, source: AnchorSource, objective: LossConfig) -> OpdStep:
        config = TrainingConfig(anchors_per_sequence=PER_SEQUENCE)
        return OpdStep(self.moved, self.bench.target, source, objective, config, self.table.proposals)


@pytest.fixture(scope="module")
def world(eagle_bench: Bench) -> World:
    trained = eagle_bench.drafters["trained"]
    answered = [(p.prompt_id, p.token_ids, eagle_bench.greedy[p.prompt_id]) for p in eagle_bench.prompts[:COUNT]]
    trajectories = [Trajectory(name, prompt + answer, len(prompt)) for name, prompt, answer in answered]
    moved = copy.deepcopy(trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    features = FeatureSource(eagle_bench.target, trained.target_layer_ids, trajectories)
    unmined = World(eagle_bench, moved, trajectories, MinedTable([], 4), features)
    return replace(unmined, table=unmined.mined_by(trained))


def test_chains_of_the_training_are_judged_as_replay_judges_them(world: World) -> None:
    """At the anchors of its trace the steps are the trace: what is accepted is decided on the trajectory's tokens, what
    is proposed behind a rejection is the drafter's own."""
    drafter, batch = world.moved, world.features.batch(INDICES)
    fresh = world.mined_by(drafter)
    anchors, expected = fresh.draw(INDICES, "visited", 30, draw_randomly, step_rng(0, 0), torch.device("cpu"))
    context = context_of(drafter, batch)
    hidden = block_hidden(drafter, context, batch, anchors)
    head = drafter.head_over(world.bench.target.head_weight, None)
    tokens = batch.tokens.gather(1, anchors.positions)
    own = drafter.propose(context, tokens, anchors.positions, drafter.block_size, head).tokens
    steps = judge(hidden, batch, anchors, head, proposals=4, positions_per_chunk=64, proposed=own)
    for name in ("accepted", "committed", "rejected_offset", "proposed"):
        assert torch.equal(getattr(steps, name), getattr(expected, name)), name
    scored = with_scores(steps, world.bench.target, batch, anchors, 4)
    torch.testing.assert_close(scored.target_logprobs, expected.target_logprobs, equal_nan=True, atol=3e-4, rtol=1e-4)
    without = judge(hidden, batch, anchors, head, proposals=4, positions_per_chunk=64)
    for name in ("accepted", "committed", "rejected_offset"):
        assert torch.equal(getattr(without, name), getattr(expected, name)), name
    assert not torch.equal(without.proposed, expected.proposed), "on the trajectory's tokens it proposes others"
    small = judge(hidden, batch, anchors, head, proposals=2, positions_per_chunk=64)
    assert torch.equal(small.accepted, steps.accepted.clamp(max=2))


def test_mining_again_gives_the_trace_of_the_current_weights(world: World) -> None:
    remining = world.remining(10, scored=True)
    figures = remining.refresh(10, INDICES, world.view())
    fresh = world.mined_by(world.moved)
    for i in INDICES:
        for name in ("anchors", "accepted", "committed", "rejected_offset", "proposed"):
            ours, expected = getattr(remining.current.steps[i], name), getattr(fresh.steps[i], name)
            np.testing.assert_array_equal(ours, expected, err_msg=name)
        np.testing.assert_allclose(remining.current.steps[i].target_logprobs, fresh.steps[i].target_logprobs, atol=3e-4)
    assert 0 < figures["trace_changed_share"] < 1
    assert figures["remined_trajectories"] == 3


KINDS = ["errors", "visited", "successors", "random", "rolling"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["matched", "paper"])
def test_a_step_of_opd_trains_every_parameter(kind: str, loss: str, world: World) -> None:
    objective = LossConfig.model_validate(loss).resolved(Eagle3Drafter.recipe, False, 0.0)
    step = world.step(world.source(kind), objective)
    for number in (5, 6):  # the second follows the anchors of the first where a source rolls on
        report = step.loss(number, INDICES, world.features.batch(INDICES), step_rng(0, number))
        assert report.loss.isfinite()
        assert report.blocks == len(INDICES) * PER_SEQUENCE
        assert ("loss_rejected" in report.figures) == (loss == "paper")
        assert ("steps_changed_share" in report.figures) == (kind in ("errors", "visited"))
        gradients = torch.autograd.grad(report.loss, list(world.moved.parameters()))
        for (name, _), gradient in zip(world.moved.named_parameters(), gradients, strict=True):
            assert gradient.isfinite().all(), name
            assert gradient.any(), name


def test_a_step_has_the_loss_of_the_chains_that_mining_finds(world: World) -> None:
    """Read from the table, or drafted, judged and scored in the step: proposals, scores and the states behind them."""
    objective, many = LossConfig.model_validate("paper").resolved(Eagle3Drafter.recipe, False, 0.0), 30
    drafter, batch, fresh = world.moved, world.features.batch(INDICES), world.mined_by(world.moved)
    anchors, steps = fresh.draw(INDICES, "errors", many, draw_randomly, step_rng(0, 5), torch.device("cpu"))
    judged_behind = (steps.target_logprobs.isfinite().sum(-1) - steps.rejected_offset)[steps.rejected_offset > 0]
    assert int(judged_behind.sum()) > 50, "proposals behind a rejection, on the drafter's own prefix"

    context, target_head = context_of(drafter, batch), world.bench.target.head_weight
    hidden = block_hidden(drafter, context, batch, anchors)
    on_own = block_hidden_on(drafter, context, batch, anchors, steps.proposed)
    heads = heads_of(drafter, world.bench.target)
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

    mined = TableAnchors(
        Remining(fresh, drafter, world.bench.target, every=0, scored=True), "errors", many, draw_randomly
    )
    for source in (There(many, draw_randomly), mined):
        report = world.step(source, objective).loss(5, INDICES, batch, step_rng(0, 5))
        for name in ("loss_response", "loss_rejected"):
            assert report.figures[name] == pytest.approx(expected[name], rel=1e-3), name
        assert report.figures.get("steps_changed_share", 0) == 0


@pytest.mark.parametrize("kind", ["errors", "visited"])
def test_mining_in_a_step_leaves_its_gradient_alone(kind: str, world: World) -> None:
    """Autocast remembers its copies of weights: none made without gradient may reach the training."""
    objective, batch = (
        LossConfig.model_validate("paper").resolved(Eagle3Drafter.recipe, False, 0.0),
        world.features.batch(INDICES),
    )
    before, inside = world.remining(1, scored=True), world.remining(1, scored=True)
    with torch.autocast("cpu", torch.bfloat16):
        before.refresh(5, INDICES, world.view())
    gradients = []
    for remining in (before, inside):
        source = TableAnchors(remining, "errors" if kind == "errors" else "visited", PER_SEQUENCE, draw_evenly)
        step = world.step(source, objective)
        with torch.autocast("cpu", torch.bfloat16):
            report = step.loss(5, INDICES, batch, step_rng(0, 5))
        gradients.append(torch.autograd.grad(report.loss, list(world.moved.parameters())))
        assert ("trace_changed_share" in report.figures) == (remining is inside)
    for (name, _), a, b in zip(world.moved.named_parameters(), *gradients, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["successors", "random", "rolling"])
def test_drafting_in_a_step_leaves_its_gradient_alone(kind: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for its own proposals: bit for bit the gradient of a step that is handed the proposals ready-made."""
    objective = LossConfig.model_validate("paper").resolved(Eagle3Drafter.recipe, False, 0.0)
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
            report = world.step(world.source(kind), objective).loss(
                5, INDICES, world.features.batch(INDICES), step_rng(0, 5)
            )
        gradients.append(torch.autograd.grad(report.loss, list(world.moved.parameters())))
    for (name, _), a, b in zip(world.moved.named_parameters(), *gradients, strict=True):
        assert a.any(), name
        assert torch.equal(a, b), name
