"""The heads that bias an offset by the tokens before it, against plain loops in float64."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from draftsmith.stages.drafters.checkpoint import upgrade_drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.drafters.dspark.config import DSparkConfig
from draftsmith.stages.drafters.dspark.model import DSparkDrafter
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.target.causal_lm import Target
from tests.testbed import random_target
from tests.testbed.dspark import random_dspark

TOLERANCE = 3e-5  # float32 against float64 on values of order one
Kind = Literal["gated", "rnn"]
KINDS: list[Kind] = ["gated", "rnn"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


class Blocks:
    """Blocks after three anchors of one answer, on random tokens."""

    def __init__(self, target: Target, drafter: DSparkDrafter):
        text = random_target.trajectories(1, seed=3)[0]
        tokens = torch.tensor([text.tokens])
        self.anchors = torch.tensor([[4, 7, 8]])
        self.given = torch.randint(0, 60, (1, 3, drafter.block_size - 1), generator=torch.Generator().manual_seed(1))
        self.given[..., 0] = tokens.gather(1, self.anchors)
        self.head = drafter.head_over(target.head_weight, None)
        features = target.features(tokens, drafter.target_layer_ids)
        with torch.no_grad():
            self.context = drafter.encode(features, tokens, torch.arange(tokens.shape[1])[None])
            self.hidden = drafter.block_hidden(self.context, self.given, self.anchors)


def plainly(drafter: DSparkDrafter, kind: Kind, states: torch.Tensor, tokens: list[int]) -> list[torch.Tensor]:
    """Return the bias [V] of each offset of a block. states: [K, H] float64."""
    tensors = {name: p.detach().double() for name, p in drafter.markov_head.named_parameters()}
    w1, w2, rank = tensors["markov_w1.weight"], tensors["markov_w2.weight"], drafter.config.markov_rank
    biases, state = [], torch.zeros(rank, dtype=torch.float64)
    for h, token in zip(states, tokens, strict=True):
        e = w1[token]
        if kind == "gated":
            gate = tensors["gate_proj.weight"] @ torch.cat([h, e]) + tensors["gate_proj.bias"]
            biases.append(w2 @ (e / (1 + torch.exp(-gate))))
            continue
        joint = tensors["joint_proj.weight"] @ torch.cat([state, e, h]) + tensors["joint_proj.bias"]
        keeps = 1 / (1 + torch.exp(-joint[:rank]))
        state = keeps * state + (1 - keeps) * torch.tanh(joint[rank : 2 * rank])
        biases.append(w2 @ torch.tanh(joint[2 * rank :]))
    return biases


@pytest.mark.parametrize(("confidence_head", "reads_token"), [(True, True), (True, False), (False, True)])
def test_logits_and_confidence_equal_the_plain_reference(
    confidence_head: bool, reads_token: bool, kind: Kind, plain_target: Target
) -> None:
    drafter = random_dspark(
        plain_target, confidence_head=confidence_head, confidence_reads_token=reads_token, markov_head=kind
    )
    blocks, H = Blocks(plain_target, drafter), drafter.config.hidden_size
    logits = blocks.head.logits(blocks.hidden)
    w1 = drafter.markov_head.markov_w1.weight.detach().double()
    for block in range(3):
        states, tokens = blocks.hidden[0, block, :, :H].double(), blocks.given[0, block].tolist()
        for k, bias in enumerate(plainly(drafter, kind, states, tokens)):
            expected = plain_target.head_weight.double() @ states[k] + bias
            torch.testing.assert_close(logits[0, block, k].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
        if drafter.confidence_head is None:
            continue
        proj = drafter.confidence_head.proj
        # of the token itself, whatever the bias is upgrade of
        read = torch.cat([states, w1[tokens]], -1) if reads_token else states
        expected_logit = read @ proj.weight[0].detach().double() + proj.bias.detach().double()
        found = drafter.confidence(blocks.hidden)[0, block].detach().double()
        torch.testing.assert_close(found, expected_logit, atol=TOLERANCE, rtol=TOLERANCE)


def test_an_upgraded_drafter_has_the_same_proposals_and_learns(
    kind: Any, plain_target: Target, plain_drafter: DFlashDrafter
) -> None:
    shape = DSparkConfig(kind="dspark", markov_rank=6, markov_head=kind)
    upgrade, again = (upgrade_drafter(plain_drafter, shape, plain_target, seed=0) for _ in range(2))
    assert isinstance(upgrade, DSparkDrafter) and upgrade.block_size == plain_drafter.block_size
    assert all(
        torch.equal(a, b) for a, b in zip(upgrade.parameters(), again.parameters(), strict=True)
    )  # seeded, all of it
    texts = random_target.trajectories(3, seed=2)
    traces = Replayer(plain_target).traces({"before": plain_drafter, "after": upgrade}, texts)
    for before, after in zip(traces["before"], traces["after"], strict=True):
        assert before.proposed.tolist() == after.proposed.tolist()
    blocks = Blocks(plain_target, upgrade)
    hidden = upgrade.block_hidden(blocks.context, blocks.given, blocks.anchors)
    blocks.head.logits(hidden).logsumexp(-1).sum().backward()
    assert float(upgrade.markov_head.markov_w2.weight.grad.abs().max()) > 0  # type: ignore[union-attr]
