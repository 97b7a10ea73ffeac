"""A drafter that draws its proposals: what it is compared with, whatever temperature and top-p answers have."""

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
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.sampling import SamplingParams
from draftsmith.stages.training.batches import FeatureSource, step_rng
from draftsmith.stages.training.blocks import Anchors, block_hidden, context_of, position_anchors
from draftsmith.stages.training.config import OpdConfig, SftConfig, TrainingConfig
from draftsmith.stages.training.lm_heads import Heads, HeadSource
from draftsmith.stages.training.loss_config import PositionWeights, ResponseStream
from draftsmith.stages.training.opd import verify_steps
from draftsmith.stages.training.opd.trainer import OpdTraining
from draftsmith.stages.training.opd.verify_steps import judge
from draftsmith.stages.training.response_loss import Feedback, _judged
from draftsmith.stages.training.sft.trainer import SftTraining
from tests.stages.training.test_accumulation import mined
from tests.testbed import random_target
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


def judged_at(
    sampling: SamplingParams, loss: Any, tokens: torch.Tensor, hidden: torch.Tensor, heads: Heads
) -> torch.Tensor:
    """[N] losses, as the trainings ask for them. hidden: the drafter's, with gradient; the target's are the same."""
    target = hidden.detach()
    feedback = Feedback(tokens, tokens, target, Head(heads.target.weight), heads.target.weight, 1.0, sampling)
    stream = ResponseStream(loss=loss, scope="block", beyond=0, positions=PositionWeights(kind="uniform"))
    return _judged(hidden, feedback, heads, stream, positions_per_chunk=4).terms


def a_head() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(V, H, generator=draw), torch.randn(N, H, generator=draw)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("loss", ["forward_kl", "tests.lab.losses:tv", "tests.lab.losses:lk"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_targets_own_logits_have_no_loss_at_any_temperature(
    loss: Any, trained: bool, sampling: SamplingParams
) -> None:
    weight, hidden = a_head()
    own = hidden.requires_grad_()
    terms = judged_at(sampling, loss, torch.zeros(N, dtype=torch.long), own, Heads(Head(weight), Head(weight), trained))
    torch.testing.assert_close(terms.detach(), torch.zeros(N), atol=1e-6, rtol=0)
    if loss == "forward_kl":
        (slope,) = torch.autograd.grad(terms.sum(), own)
        assert float(slope.abs().max()) < 1e-5


@pytest.mark.parametrize("sampling", [SamplingParams(0.6), SamplingParams(1.5)], ids=str)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("loss", "share"), [("cross_entropy", 1.0), ("ce_l1", 0.1)])
def test_nor_do_tokens_that_were_drawn_at_a_temperature_move_them(
    loss: Any, share: float, trained: bool, sampling: SamplingParams
) -> None:
    """On average over what the target draws there, the slope of cross-entropy is zero, and at no other temperature."""
    weight, hidden = a_head()
    p = probabilities(hidden[0] @ weight.T, sampling.temperature).float()
    slopes = {}
    for asked in (sampling, SamplingParams(1.0)):
        own = hidden[:1].expand(V, H).clone().requires_grad_()
        heads = Heads(Head(weight), Head(weight), trained)
        terms = judged_at(asked, loss, torch.arange(V), own, heads)
        (slope,) = torch.autograd.grad((terms * p).sum(), own)
        slopes[asked.temperature] = float(slope.sum(0).abs().max())
    assert slopes[sampling.temperature] < 1e-5 < 1e-2 * share < slopes[1.0]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_confidence_is_of_what_is_kept_under_the_distribution(sampling: SamplingParams) -> None:
    weight, hidden = a_head()
    own = Head(weight * 0.7)  # another distribution than the target's
    said = 2.0
    heads = Heads(own, Head(weight), trained=True, confidence=lambda h: torch.full(h.shape[:1], said))
    plain = judged_at(sampling, "forward_kl", torch.zeros(N, dtype=torch.long), hidden, Heads(own, Head(weight), True))
    terms = judged_at(sampling, "forward_kl", torch.zeros(N, dtype=torch.long), hidden, heads) - plain
    kept = 1 - (terms - np.log1p(np.exp(-said))) / said  # binary cross-entropy is linear in what it is held against
    q = probabilities(hidden @ own.weight.T, sampling.temperature)
    p = sampling_distribution(hidden @ weight.T, sampling)
    expected = torch.minimum(p, q).sum(-1).float()
    torch.testing.assert_close(kept.detach(), expected, atol=1e-4, rtol=0)


def test_of_greedy_answers_it_is_whether_the_argmax_is_kept() -> None:
    weight, hidden = a_head()
    own, said, K = Head(weight * 0.7), 2.0, torch.arange(N)
    text = (hidden @ weight.T).argmax(-1)
    text[::2] = (hidden @ own.weight.T).argmin(-1)[::2]  # where another token stands
    plain = judged_at(SamplingParams(), "forward_kl", text, hidden, Heads(own, Head(weight), True))
    heads = Heads(own, Head(weight), trained=True, confidence=lambda h: torch.full(h.shape[:1], said))
    kept = 1 - (judged_at(SamplingParams(), "forward_kl", text, hidden, heads) - plain - np.log1p(np.exp(-said))) / said
    torch.testing.assert_close(kept.detach(), (K % 2).float(), atol=1e-4, rtol=0)


def test_every_step_of_opd_draws_its_proposals_by_numbers_of_its_own(plain_target: Target) -> None:
    """Neither those of the step before nor those of mining: what was rejected then may be kept now."""
    texts, drafter = random_target.trajectories(2, seed=2), random_dspark(plain_target)
    table = mined(texts, drafter.block_size - 1)
    training = OpdTraining(drafter, plain_target, texts, table, OpdConfig(), sampling=SamplingParams(0.7))
    batch = FeatureSource(plain_target, drafter.target_layer_ids, texts).batch([0, 1])
    assert batch.hidden is not None
    of_mining = TargetSampler.for_trajectories(
        plain_target, batch.hidden, texts, SamplingParams(0.7), drafter.block_size - 1
    )
    of_steps = [training._step._text(batch, step) for step in (0, 1, 1)]
    numbers = [text.numbers for text in (of_mining, *of_steps) if text is not None]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(numbers)] == [False, False, True]


WHOLE: dict[str, Any] = {"scope": "block", "beyond": 0, "positions": {"kind": "uniform"}}


@pytest.mark.parametrize("kind", ["sft", "opd"])
def test_trainings_hold_tokens_and_confidence_against_the_answers_distribution(kind: str, plain_target: Target) -> None:
    texts = random_target.trajectories(4, seed=2)

    def loss(drafter: Drafter, of: str, sampling: SamplingParams) -> float:
        if kind == "sft":
            training: Any = SftTraining(
                drafter, plain_target, texts, SftConfig.model_validate({"loss": of}), sampling=sampling
            )
        else:
            table = mined(texts, drafter.block_size - 1)
            config = OpdConfig.model_validate({"anchors": "random", "loss": {"response": {"loss": of, **WHOLE}}})
            training = OpdTraining(drafter, plain_target, texts, table, config, sampling=sampling)
        return float(training.loss(0).loss.detach())

    choosing, biased = random_dflash2(plain_target), random_dspark(plain_target)
    same = pytest.approx(loss(choosing, "forward_kl", SamplingParams(1.0)), rel=1e-6)
    assert loss(choosing, "forward_kl", SamplingParams(0.7)) == same, "distributions are compared at temperature 1"
    for of in ("cross_entropy", "ce_l1"):
        assert loss(choosing, of, SamplingParams(0.7)) != pytest.approx(
            loss(choosing, of, SamplingParams(1.0)), rel=1e-4
        ), of
    plain = loss(biased, "forward_kl", SamplingParams(0.7))
    for sampling in (SamplingParams(0.7, 0.5), SamplingParams(0.7, top_k=3)):
        assert loss(biased, "forward_kl", sampling) != pytest.approx(plain, rel=1e-4), "confidence"


@pytest.mark.parametrize(("temperature", "losses"), [(0.0, ("cross_entropy",) * 2), (0.7, ("cross_entropy", "ce_l1"))])
def test_sft_of_sampled_answers_reads_the_distribution_where_that_was_better(
    temperature: float, losses: tuple[str, ...], plain_target: Target
) -> None:
    texts, drafters = random_target.trajectories(2), (random_drafter(plain_target), random_dflash2(plain_target))
    trainings = [
        SftTraining(each, plain_target, texts, SftConfig(), sampling=SamplingParams(temperature)) for each in drafters
    ]
    assert tuple(each.stream.loss for each in trainings) == losses
    asked = SftTraining(
        drafters[1], plain_target, texts, SftConfig(loss="cross_entropy"), sampling=SamplingParams(temperature)
    )
    assert asked.stream.loss == "cross_entropy", "what is asked for is done"


@pytest.mark.parametrize("make", [random_dspark, random_dflash2])
def test_a_smaller_served_block_keeps_what_its_offsets_keep(make: Any, plain_target: Target) -> None:
    """Blocks overlap: what one does not serve, another one serves."""
    drafter, texts = make(plain_target), random_target.trajectories(2, seed=5)
    batch = FeatureSource(plain_target, drafter.target_layer_ids, texts, with_hidden=True).batch([0, 1])
    positions = torch.tensor([[t.first_anchor + i for i in (4, 3, 2, 1, 0)] for t in texts])
    anchors = Anchors(positions, torch.ones_like(positions, dtype=torch.bool))
    heads = HeadSource(drafter, plain_target.head_weight, TrainingConfig()).draw(step_rng(0, 0), [batch.tokens])
    hidden, of_target = block_hidden(drafter, context_of(drafter, batch), batch, anchors), batch.hidden
    assert of_target is not None

    def accepted(proposals: int, salt: int) -> torch.Tensor:
        text = TargetSampler.for_trajectories(
            plain_target, of_target, texts, SamplingParams(1.5), drafter.block_size - 1, salt
        )
        known: Any = {"proposals": proposals, "chooser": heads.chooser, "text": text}
        return judge(hidden, batch, anchors, heads.drafter, **known).accepted

    for salt in range(30):
        assert torch.equal(accepted(1, salt), accepted(drafter.block_size - 1, salt).clamp(max=1))


@pytest.mark.parametrize("make", [random_dspark, random_dflash2])
def test_blocks_are_judged_alike_however_many_laws_fit_into_memory(
    make: Any, plain_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, texts, sampling = make(plain_target), random_target.trajectories(3, seed=5), SamplingParams(0.8, 0.9, 30)
    batch = FeatureSource(plain_target, drafter.target_layer_ids, texts, with_hidden=True).batch([0, 1, 2])
    anchors = position_anchors(texts, 5, step_rng(0, 0), torch.device("cpu"))
    heads = HeadSource(drafter, plain_target.head_weight, TrainingConfig()).draw(step_rng(0, 0), [batch.tokens])
    assert batch.hidden is not None
    text = TargetSampler.for_trajectories(plain_target, batch.hidden, texts, sampling, drafter.block_size - 1)

    def judged() -> tuple[Any, ...]:
        hidden = block_hidden(drafter, context_of(drafter, batch), batch, anchors)
        known = {"proposals": drafter.block_size - 1, "chooser": heads.chooser, "text": text}
        steps = judge(hidden, batch, anchors, heads.drafter, **known)
        replayer = Replayer(plain_target, ReplayOptions(sampling=sampling))
        return steps.accepted, replayer.traces({"it": drafter}, texts)["it"][0].proposed

    whole = judged()
    monkeypatch.setattr(sampled_replay, "LOGITS_AT_ONCE", 2 * len(texts) * V)  # fewer than one distribution a text
    monkeypatch.setattr(verify_steps, "LOGITS_AT_ONCE", 7 * 7 * drafter.config.hidden_size)  # of 7 candidates
    of_choices = note_choices(drafter, monkeypatch)
    assert text.anchors_per_chunk == 1
    assert all(np.array_equal(a, b) for a, b in zip(judged(), whole, strict=True))
    assert all(count <= 7 for count in of_choices) and bool(of_choices) == drafter.has_selector


def note_choices(drafter: Drafter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions are asked for together, from here on."""
    noted: list[int] = []
    choices = drafter.selector_logits

    def taken(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        noted.append(hidden[..., 0].numel())
        return choices(hidden, *others)

    monkeypatch.setattr(drafter, "selector_logits", taken)
    return noted
