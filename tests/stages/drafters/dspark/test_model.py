"""DSpark's model against plain loops and formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from draftsmith.stages.drafters.dspark.model import DSparkDrafter
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.anchors import position_anchors
from draftsmith.stages.training.batches import FeatureSource, step_rng
from draftsmith.stages.training.config import SftConfig, TrainingConfig
from draftsmith.stages.training.drafted_blocks import block_labels, draft_blocks, encode_batch
from draftsmith.stages.training.loss_report import LossReport
from draftsmith.stages.training.sft.body import sft_loss
from draftsmith.stages.training.softmax_heads import LossContext
from tests.stages.drafters.dflash import reference
from tests.stages.drafters.texts import Texts
from tests.stages.training.case import heads_of
from tests.testbed import random_target
from tests.testbed.dspark import random_dspark

TOLERANCE = 3e-5  # float32 against float64 on values of order one


@pytest.mark.parametrize("from_anchor", [True, False])
def test_logits_equal_the_plain_float64_reference(from_anchor: bool, plain_target: Target) -> None:
    drafter = random_dspark(plain_target, from_anchor=from_anchor)
    texts, anchors, K = Texts(plain_target, drafter, count=1, seed=3), torch.tensor([[4, 7, 8]]), drafter.block_size - 1
    given = torch.randint(0, 60, (1, 3, K), generator=torch.Generator().manual_seed(1))
    given[..., 0] = texts.tokens[:, anchors[0]]
    with torch.no_grad():
        hidden = drafter.block_hidden(texts.context(), given, anchors)
        logits, confidence = texts.head.logits(hidden), drafter.confidence(hidden)
    tensors = {name: tensor.detach().double() for name, tensor in drafter.named_parameters()}
    w1, w2 = tensors["markov_head.markov_w1.weight"], tensors["markov_head.markov_w2.weight"]
    sizes = {"block_size": K, "first": 0} if from_anchor else {}
    for index, anchor in enumerate(anchors[0].tolist()):
        states = reference.hidden_of(texts, anchor, **sizes)
        for k in range(K):
            before = w1[given[0, index, k]]
            expected = plain_target.head_weight.double() @ states[k] + w2 @ before
            torch.testing.assert_close(logits[0, index, k].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
            expected_logit = tensors["confidence_head.proj.weight"][0] @ torch.cat([states[k], before])
            expected_logit = expected_logit + tensors["confidence_head.proj.bias"][0]
            torch.testing.assert_close(confidence[0, index, k].double(), expected_logit, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_reduced_head_has_the_same_logits_for_its_tokens(plain_target: Target) -> None:
    drafter = random_dspark(plain_target)
    hidden = torch.randn(3, 32 + 6, generator=torch.Generator().manual_seed(0))
    whole = drafter.head_over(plain_target.head_weight, None).logits(hidden)
    part = drafter.head_over(plain_target.head_weight, torch.tensor([40, 3, 17]))
    assert part.token_ids is not None and part.token_ids.tolist() == [3, 17, 40]
    torch.testing.assert_close(part.logits(hidden), whole[:, [3, 17, 40]])


# ---- the authors' loss


def loss_of(
    drafter: DSparkDrafter, target: Target, sampling: SamplingParams = GREEDY, **fields: str
) -> tuple[LossReport, torch.Tensor, FeatureSource]:
    texts = random_target.trajectories(3, seed=5)
    source = FeatureSource(target, drafter.target_layer_ids, texts, TrainingConfig())
    batch = source.batch([0, 1, 2])
    anchors = position_anchors(texts, 3, step_rng(0, 0).random(3), torch.device("cpu"))
    heads = heads_of(drafter, target)
    stream = SftConfig.model_validate(fields).stream(drafter.recipe)
    assert target.head_weight is heads.target.weight
    context = LossContext(heads, target.head_weight, 7, sampling)
    report = sft_loss(drafter, batch, anchors, context, stream, temperature=1.0)
    return report, anchors, source


@pytest.mark.parametrize(("confidence_head", "reads_token"), [(True, True), (True, False), (False, True)])
def test_the_loss_equals_the_authors(confidence_head: bool, reads_token: bool, plain_target: Target) -> None:
    """Value and gradient against the formula in float64, over whole rows of logits and without a chunk. Theirs holds
    the confidence against accepted sampled proposals; for greedy answers see `test_sampled_losses.py`."""
    drafter = random_dspark(plain_target, confidence_head=confidence_head, confidence_reads_token=reads_token)
    report, anchors, source = loss_of(drafter, plain_target, SamplingParams(1.0))
    report.loss.backward()
    found = {name: p.grad for name, p in drafter.named_parameters()}
    drafter.zero_grad(set_to_none=True)

    batch, K = source.batch([0, 1, 2]), drafter.block_size - 1
    labels, inside = block_labels(batch, anchors, K)
    hidden = draft_blocks(drafter, encode_batch(drafter, batch), batch, anchors).hidden
    state, before = hidden.split([32, 6], -1)
    logits = (state @ plain_target.head_weight.T + before @ drafter.markov_head.markov_w2.weight.T).double()
    at = (anchors[..., None] + torch.arange(K)).clamp(max=batch.tokens.shape[1] - 1)
    assert batch.hidden is not None
    theirs = torch.stack([row[i] for row, i in zip(batch.hidden, at, strict=True)])
    p, q = plain_target.logits(theirs).double().softmax(-1), logits.softmax(-1)
    weights = torch.exp(-torch.arange(K) / 4.0) * inside
    l1 = (p - q).abs().sum(-1)
    terms = 0.1 * F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view_as(l1) + 0.9 * l1
    if confidence_head:
        proj = drafter.confidence_head.proj  # type: ignore[union-attr]
        expected_logit = proj((hidden if reads_token else state).detach())[..., 0].double()
        terms = terms + F.binary_cross_entropy_with_logits(expected_logit, (1 - l1 / 2).detach(), reduction="none")
    expected = (weights * terms).sum() / weights.sum()
    assert float(report.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    expected.backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-5, rtol=2e-4, msg=name)
