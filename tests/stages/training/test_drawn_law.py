"""A drafter that draws its proposals is trained for the law that it draws them under: temperature and top-p."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.drawing import probabilities
from draftsmith.stages.drafters.head import Head
from draftsmith.stages.drafters.law import Law
from draftsmith.stages.replay import drawn
from draftsmith.stages.replay.corpus import replay_all
from draftsmith.stages.replay.drawn import SampledText
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.anchors import position_anchors
from draftsmith.stages.training.batches import FeatureSource, step_rng
from draftsmith.stages.training.blocks import block_hidden, context_of
from draftsmith.stages.training.config import SftConfig, TrainingConfig
from draftsmith.stages.training.loss_config import PositionWeights, ResponseStream
from draftsmith.stages.training.on_policy.config import OpdConfig
from draftsmith.stages.training.on_policy.training import OpdTraining
from draftsmith.stages.training.on_policy.verify_steps import judge
from draftsmith.stages.training.response import Feedback, _judged, drawn_at
from draftsmith.stages.training.supervised import SftTraining
from draftsmith.stages.training.vocabulary import Heads, HeadSource
from tests.stages.training.test_accumulation import mined
from tests.testbed import random_target
from tests.testbed.dflash2 import random_dflash2
from tests.testbed.dspark import random_dspark
from tests.testbed.random_target import random_drafter

N, H, V = 6, 8, 40
LAWS = [Law(0.6), Law(1.5), Law(0.7, 0.8)]


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("loss", ["forward_kl", "tv", "lk", "ce_l1"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_drafter_that_says_what_the_target_says_has_the_least_loss(loss: Any, trained: bool, law: Law) -> None:
    """Its logits are the target's: what it draws at the temperature is kept, but for what top-p drops."""
    draw = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(V, H, generator=draw), torch.randn(N, H, generator=draw)
    heads, p = Heads(Head(weight), Head(weight), trained=trained), probabilities(hidden @ weight.T, law.temperature)
    tokens = p.argmax(-1)
    feedback = Feedback(tokens, tokens, hidden, Head(weight), weight, law.temperature, law)
    stream = ResponseStream(loss=loss, scope="block", beyond=0, positions=PositionWeights(kind="uniform"))
    own = hidden.clone().requires_grad_()
    terms = _judged(own, feedback, heads, stream, positions_per_chunk=4).terms
    kept = probabilities(hidden @ weight.T, law.temperature, law.top_p)
    missed = 1 - torch.minimum(kept, p).sum(-1).float()
    least = {
        "forward_kl": -(1 - missed).log(),  # all of the mass that top-p leaves is as much larger
        "tv": missed,
        "lk": -(1 - missed).log(),
        "ce_l1": -0.1 * p.amax(-1).log().float() + 0.9 * 2 * missed,
    }[loss]
    torch.testing.assert_close(terms.detach(), least, atol=1e-5, rtol=1e-4)
    if law.top_p == 1 and loss == "forward_kl":
        (slope,) = torch.autograd.grad(terms.sum(), own)
        assert float(slope.abs().max()) < 1e-5
    assert drawn_at(law) == law.temperature


def trained_for(drafter: Drafter, target: Target, law: Law, stage: str) -> float:
    """The loss of the first step."""
    texts = random_target.trajectories(4, seed=2)
    fields = {"steps": 4, "sequences_per_step": 4, "anchors_per_sequence": 4, "compute_dtype": "float32"}
    said: Any = {"temperature": law.temperature, "top_p": law.top_p}
    if stage == "sft":
        sft = SftConfig.model_validate({**fields, "loss": "ce_l1"})
        return float(SftTraining(drafter, target, texts, sft, **said).loss(0).loss.detach())
    whole = {"loss": "forward_kl", "scope": "block", "beyond": 0, "positions": {"kind": "uniform"}}
    opd = OpdConfig.model_validate({**fields, "anchors": "random", "loss": {"response": whole}})
    table = mined(texts, drafter.block_size - 1)
    return float(OpdTraining(drafter, target, texts, table, opd, **said).loss(0).loss.detach())


@pytest.mark.parametrize("stage", ["sft", "opd"])
def test_both_trainings_ask_for_the_law_where_proposals_are_drawn(stage: str, plain_target: Target) -> None:
    drawing, greedy = random_dspark(plain_target), random_drafter(plain_target)
    warm, nucleus = (trained_for(drawing, plain_target, law, stage) for law in (Law(0.7), Law(0.7, 0.5)))
    assert warm != pytest.approx(nucleus, rel=1e-4), "top-p counts"
    one, other = (trained_for(greedy, plain_target, law, stage) for law in (Law(0.7), Law(0.7, 0.5)))
    assert one == pytest.approx(other, rel=1e-6), "argmaxes are what they are"


@pytest.mark.parametrize("make", [random_dspark, random_dflash2])
def test_blocks_are_judged_alike_however_many_laws_fit_into_memory(
    make: Any, plain_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, texts, law = make(plain_target), random_target.trajectories(3, seed=5), Law(0.8, 0.9)
    batch = FeatureSource(plain_target, drafter.target_layer_ids, texts, with_hidden=True).batch([0, 1, 2])
    anchors = position_anchors(texts, 5, step_rng(0, 0), torch.device("cpu"))
    heads = HeadSource(drafter, plain_target.head_weight, TrainingConfig()).draw(step_rng(0, 0), [batch.tokens])
    assert batch.hidden is not None
    text = SampledText.of(plain_target, batch.hidden, texts, law, drafter.block_size - 1)

    def judged() -> tuple[Any, ...]:
        hidden = block_hidden(drafter, context_of(drafter, batch), batch, anchors)
        known = {"proposals": drafter.block_size - 1, "chooser": heads.chooser, "text": text}
        steps = judge(hidden, batch, anchors, heads.drafter, **known)
        return steps.accepted, replay_all(plain_target, {"it": drafter}, texts, law=law)["it"][0].proposed

    whole = judged()
    monkeypatch.setattr(drawn, "LOGITS_AT_ONCE", 2 * len(texts) * V)  # fewer than one law a text
    assert text.anchors_at_once == 1
    assert all(np.array_equal(a, b) for a, b in zip(judged(), whole, strict=True))
