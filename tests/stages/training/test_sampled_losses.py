"""Losses on sampled answers: distributions at temperature 1, tokens and confidence at the answers' sampling."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import probabilities, sampling_distribution
from draftsmith.stages.replay import sampled as sampled_replay
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.sampled import TargetSampler
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import SamplingParams
from draftsmith.stages.training.anchors import position_anchors
from draftsmith.stages.training.batches import FeatureSource, step_rng
from draftsmith.stages.training.config import OpdConfig, SftConfig, TrainingConfig
from draftsmith.stages.training.drafted_blocks import draft_blocks, encode_batch
from draftsmith.stages.training.loss_registry import PositionWeights, ResponseStream
from draftsmith.stages.training.opd import verify_steps
from draftsmith.stages.training.opd.body import MinedData, OpdTraining
from draftsmith.stages.training.opd.verify_steps import verify_blocks
from draftsmith.stages.training.response_loss import TargetSignal, head_loss
from draftsmith.stages.training.sft.body import SftTraining
from draftsmith.stages.training.softmax_heads import LossContext, SoftmaxHeads
from draftsmith.stages.training.trainer import Trainer, TrainingData
from tests.stages.training.case import heads_of, hidden_of
from tests.stages.training.test_micro_batches import mined
from tests.testbed import random_target
from tests.testbed.calls import recorded
from tests.testbed.dflash2 import random_dflash2
from tests.testbed.dspark import random_dspark
from tests.testbed.random_target import random_drafter

N, H, V = 6, 8, 40
SAMPLINGS = [
    SamplingParams(0.6),
    SamplingParams(1.5),
    SamplingParams(0.7, 0.8),
    SamplingParams(0.7, 0.8, 4),
    SamplingParams(0.7, top_k=4),
]


def losses_at(
    sampling: SamplingParams, loss: Any, tokens: torch.Tensor, hidden: torch.Tensor, heads: SoftmaxHeads
) -> torch.Tensor:
    """Return the losses [N] of a training. hidden: the drafter's, with gradient; the target's are the same."""
    context = LossContext(heads, heads.target.weight, 4, sampling)
    signal = TargetSignal(tokens, tokens, hidden.detach(), context, 1.0)
    stream = ResponseStream(loss=loss, scope="block", beyond=0, positions=PositionWeights(kind="uniform"))
    return head_loss(hidden, signal, stream).terms


def a_head() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(V, H, generator=generator), torch.randn(N, H, generator=generator)


@pytest.mark.parametrize("sampling", [SamplingParams(0.6), SamplingParams(1.5)], ids=str)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("loss", "share"), [("cross_entropy", 1.0), ("ce_l1", 0.1)])
def test_tokens_sampled_at_a_temperature_do_not_move_the_targets_own_logits(
    loss: Any, share: float, trained: bool, sampling: SamplingParams
) -> None:
    """On average over what the target samples there, the slope of cross-entropy is zero; at another temperature not."""
    weight, hidden = a_head()
    p = probabilities(hidden[0] @ weight.T, sampling.temperature).float()
    slopes = {}
    for trained_for in (sampling, SamplingParams(1.0)):
        rows = hidden[:1].expand(V, H).clone().requires_grad_()
        heads = SoftmaxHeads(Head(weight), Head(weight), trained)
        terms = losses_at(trained_for, loss, torch.arange(V), rows, heads)
        (slope,) = torch.autograd.grad((terms * p).sum(), rows)
        slopes[trained_for.temperature] = float(slope.sum(0).abs().max())
    assert slopes[sampling.temperature] < 1e-5 < 1e-2 * share < slopes[1.0]


LOGIT = 2.0  # of a confidence that is the same everywhere


def confidence_labels(
    sampling: SamplingParams, tokens: torch.Tensor, hidden: torch.Tensor, own: Head, target: Head
) -> torch.Tensor:
    """Return what the confidence is trained on [N]: binary cross-entropy is linear in its label."""
    without = losses_at(sampling, "forward_kl", tokens, hidden, SoftmaxHeads(own, target, True))
    heads = SoftmaxHeads(own, target, True, confidence=lambda h: torch.full(h.shape[:1], LOGIT))
    terms = losses_at(sampling, "forward_kl", tokens, hidden, heads) - without
    return (1 - (terms - np.log1p(np.exp(-LOGIT))) / LOGIT).detach()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_confidence_of_sampled_answers_is_the_acceptance_probability(sampling: SamplingParams) -> None:
    weight, hidden = a_head()
    own = Head(weight * 0.7)  # not the target's distribution
    labels = confidence_labels(sampling, torch.zeros(N, dtype=torch.long), hidden, own, Head(weight))
    q = probabilities(hidden @ own.weight.T, sampling.temperature)
    p = sampling_distribution(hidden @ weight.T, sampling)
    torch.testing.assert_close(labels, torch.minimum(p, q).sum(-1).float(), atol=1e-4, rtol=0)


def test_the_confidence_of_greedy_answers_is_whether_the_argmax_is_accepted() -> None:
    weight, hidden = a_head()
    own = Head(weight * 0.7)
    answer = (hidden @ weight.T).argmax(-1)
    answer[::2] = (hidden @ own.weight.T).argmin(-1)[::2]  # not the proposed token
    labels = confidence_labels(SamplingParams(), answer, hidden, own, Head(weight))
    torch.testing.assert_close(labels, (torch.arange(N) % 2).float(), atol=1e-4, rtol=0)


def test_every_step_of_opd_verifies_with_other_random_numbers(plain_target: Target) -> None:
    """Not with the step before's, nor with mining's: what was rejected then may be accepted now."""
    answers, drafter = random_target.trajectories(2, seed=2), random_dspark(plain_target)
    table, sampling = mined(answers, drafter.block_size - 1), SamplingParams(0.7)
    data = MinedData(trajectories=answers, sampling=sampling, mined=table)
    training = OpdTraining(drafter, plain_target, data, OpdConfig())
    batch = FeatureSource(plain_target, drafter.target_layer_ids, answers, TrainingConfig()).batch([0, 1])
    of_mining = TargetSampler.for_trajectories(
        plain_target, hidden_of(batch), answers, sampling, drafter.block_size - 1
    )
    of_steps = [training._step._sampler(batch, step) for step in (0, 1, 1)]
    numbers = [sampler.numbers for sampler in (of_mining, *of_steps) if sampler is not None]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(numbers)] == [False, False, True]


WHOLE: dict[str, Any] = {"scope": "block", "beyond": 0, "positions": {"kind": "uniform"}}


@pytest.mark.parametrize("kind", ["sft", "opd"])
def test_only_losses_of_tokens_and_confidence_depend_on_the_answers_sampling(kind: str, plain_target: Target) -> None:
    answers = random_target.trajectories(4, seed=2)

    def loss(drafter: Drafter, name: str, sampling: SamplingParams) -> float:
        training: Trainer[Any, Any]
        if kind == "sft":
            data = TrainingData(trajectories=answers, sampling=sampling)
            training = SftTraining(drafter, plain_target, data, SftConfig.model_validate({"loss": name}))
        else:
            table = mined(answers, drafter.block_size - 1)
            config = OpdConfig.model_validate({"anchors": "random", "loss": {"response": {"loss": name, **WHOLE}}})
            steps = MinedData(trajectories=answers, sampling=sampling, mined=table)
            training = OpdTraining(drafter, plain_target, steps, config)
        (report,) = training.micro_batches(0, None)
        return float(report.loss.detach())

    selecting, with_confidence = random_dflash2(plain_target), random_dspark(plain_target)
    same = pytest.approx(loss(selecting, "forward_kl", SamplingParams(1.0)), rel=1e-6)
    assert loss(selecting, "forward_kl", SamplingParams(0.7)) == same, "distributions are compared at temperature 1"
    for name in ("cross_entropy", "ce_l1"):
        at_one = loss(selecting, name, SamplingParams(1.0))
        assert loss(selecting, name, SamplingParams(0.7)) != pytest.approx(at_one, rel=1e-4), name
    untruncated = loss(with_confidence, "forward_kl", SamplingParams(0.7))
    for sampling in (SamplingParams(0.7, 0.5), SamplingParams(0.7, top_k=3)):
        assert loss(with_confidence, "forward_kl", sampling) != pytest.approx(untruncated, rel=1e-4), "confidence"


@pytest.mark.parametrize(("temperature", "losses"), [(0.0, ("cross_entropy",) * 2), (0.7, ("cross_entropy", "ce_l1"))])
def test_the_default_loss_of_sft_on_sampled_answers_depends_on_the_architecture(
    temperature: float, losses: tuple[str, ...], plain_target: Target
) -> None:
    drafters = (random_drafter(plain_target), random_dflash2(plain_target))
    data = TrainingData(trajectories=random_target.trajectories(2), sampling=SamplingParams(temperature))
    trainings = [SftTraining(drafter, plain_target, data, SftConfig()) for drafter in drafters]
    assert tuple(training.stream.loss for training in trainings) == losses
    named = SftTraining(drafters[1], plain_target, data, SftConfig(loss="cross_entropy"))
    assert named.stream.loss == "cross_entropy"


@pytest.mark.parametrize("make", [random_dspark, random_dflash2])
def test_a_smaller_served_block_accepts_what_its_offsets_accept(make: Any, plain_target: Target) -> None:
    """Blocks overlap: an offset that one block does not serve, another one serves."""
    drafter, answers = make(plain_target), random_target.trajectories(2, seed=5)
    batch = FeatureSource(plain_target, drafter.target_layer_ids, answers, TrainingConfig()).batch([0, 1])
    anchors = torch.tensor([[t.first_anchor + i for i in (4, 3, 2, 1, 0)] for t in answers])
    heads, of_target = heads_of(drafter, plain_target), hidden_of(batch)
    blocks = draft_blocks(drafter, encode_batch(drafter, batch), batch, anchors)

    def accepted(proposals: int, salt: int) -> torch.Tensor:
        sampler = TargetSampler.for_trajectories(
            plain_target, of_target, answers, SamplingParams(1.5), drafter.block_size - 1, salt
        )
        return verify_blocks(blocks, heads, proposals=proposals, sampler=sampler).accepted

    for salt in range(30):
        assert torch.equal(accepted(1, salt), accepted(drafter.block_size - 1, salt).clamp(max=1))


@pytest.mark.parametrize("make", [random_dspark, random_dflash2])
def test_verification_is_the_same_however_many_distributions_fit_into_memory(
    make: Any, plain_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, answers, sampling = make(plain_target), random_target.trajectories(3, seed=5), SamplingParams(0.8, 0.9, 30)
    batch = FeatureSource(plain_target, drafter.target_layer_ids, answers, TrainingConfig()).batch([0, 1, 2])
    anchors = position_anchors(answers, 5, step_rng(0, 0).random(3), torch.device("cpu"))
    sampler = TargetSampler.for_trajectories(plain_target, hidden_of(batch), answers, sampling, drafter.block_size - 1)

    def verified() -> tuple[Any, ...]:
        blocks = draft_blocks(drafter, encode_batch(drafter, batch), batch, anchors)
        heads = heads_of(drafter, plain_target)
        steps = verify_blocks(blocks, heads, proposals=drafter.block_size - 1, sampler=sampler)
        replayer = Replayer(plain_target, ReplayOptions(sampling=sampling))
        return steps.accepted, replayer.traces({"it": drafter}, answers)["it"][0].proposed

    whole, fewer = verified(), 2 * len(answers) * V  # than one distribution an answer
    monkeypatch.setattr(sampled_replay, "LOGITS_PER_CHUNK", fewer)
    monkeypatch.setattr(verify_steps, "LOGITS_PER_CHUNK", 7 * 7 * drafter.config.hidden_size)  # of 7 candidates
    calls = recorded(monkeypatch, drafter, "selector_logits")
    assert sampler.positions_per_chunk <= len(answers)
    assert all(np.array_equal(a, b) for a, b in zip(verified(), whole, strict=True))
    assert all(hidden[..., 0].numel() <= 7 for hidden, *_ in calls) and bool(calls) == drafter.has_selector
