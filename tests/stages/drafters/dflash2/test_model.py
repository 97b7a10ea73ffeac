"""DFlash2 against plain loops, and upgrades from DFlash."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftsmith.stages.drafters.base import PreparedDrafter
from draftsmith.stages.drafters.checkpoint import upgrade_drafter
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.dflash2.config import DFlash2Config
from draftsmith.stages.drafters.dflash2.model import BlockConvolution, DFlash2Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.replay.chains import replay_chains
from draftsmith.stages.replay.trace import tau
from draftsmith.stages.target.causal_lm import Target
from tests.stages.drafters.dflash import reference
from tests.stages.drafters.dflash2 import reference as additions
from tests.testbed import random_target
from tests.testbed.dflash2 import SIZES, random_dflash2

TOLERANCE = 5e-5  # float32 against float64 on values of order one to ten
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize("window", [None, 4])
def test_hidden_states_and_proposals_equal_the_float64_reference(window: int | None, plain_target: Target) -> None:
    fields: dict[str, Any] = {} if window is None else {"sliding_window": window, "layer_types": (SLIDING, FULL)}
    drafter, trajectory = random_dflash2(plain_target, **fields), random_target.trajectories(1, seed=3)[0]
    tokens, anchors = torch.tensor([trajectory.tokens]), [4, 9, 7]
    features = plain_target.read(tokens, drafter.target_layer_ids).features
    assert features is not None
    at = tokens[:, anchors]
    with torch.no_grad():
        context = drafter.encode(features, tokens, torch.arange(tokens.shape[1])[None])
        hidden = drafter.block_hidden(context, at[..., None].expand(-1, -1, 4), torch.tensor([anchors]))
    proposed = drafter.propose(context, at, torch.tensor([anchors]), 5, Head(plain_target.head_weight))
    config, weights = drafter.config, dict(drafter.named_parameters())
    for index, anchor in enumerate(anchors):
        expected = reference.block_hidden(
            weights,
            plain_target.embedding,
            features[0],
            trajectory.tokens[anchor],
            anchor,
            block_size=5,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            eps=config.rms_norm_eps,
            theta=config.rope_parameters["rope_theta"],
            mask_token=plain_target.tokenizer.mask_token_id,
            windows=[window, None],
            causal=[window is not None, False],
            around=additions.around,
        )
        torch.testing.assert_close(hidden[0, index].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
        walked = additions.path(weights, expected, plain_target.head_weight, trajectory.tokens[anchor], 7)
        assert proposed[0, index].tolist() == walked
        assert walked != (expected @ plain_target.head_weight.double().T).argmax(-1).tolist(), "pairs decide"


def test_a_convolution_does_not_leave_its_block() -> None:
    """Positions before the block count as zero."""
    convolution = BlockConvolution(16, 5, 4)
    with torch.no_grad():
        for parameter in convolution.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(2))
    short, longer = (convolution.before(each)[0] for each in (x, torch.cat([torch.zeros(3, 4, 16), x], 1)))
    torch.testing.assert_close(short, longer[:, 4:])


def test_an_upgrade_from_dflash_has_the_same_proposals_and_tau(plain_target: Target) -> None:
    plain = random_target.random_drafter(plain_target, sliding_window=6, layer_types=(SLIDING, FULL))
    plain.frequent_tokens = torch.arange(random_target.VOCAB_SIZE)
    upgrade = upgrade_drafter(
        plain, DFlash2Config(kind="dflash2", num_layers=7, block_size=3, **SIZES), plain_target, seed=0
    )
    assert isinstance(upgrade, DFlash2Drafter)
    assert (upgrade.block_size, upgrade.target_layer_ids, len(upgrade.layers)) == (5, [2, 0], 2), "its own shape stays"
    assert upgrade.frequent_tokens is plain.frequent_tokens and upgrade.spans == plain.spans
    trajectories = random_target.trajectories(4, seed=2)
    traces = []
    for drafter in (plain, upgrade):
        tokens = torch.tensor([t.tokens[:10] for t in trajectories])
        short = [type(t)(t.trajectory_id, t.tokens[:10], t.prompt_length) for t in trajectories]
        features = plain_target.read(tokens, drafter.target_layer_ids).features
        assert features is not None
        with torch.no_grad():
            context = drafter.encode(features, tokens, torch.arange(10).expand(4, -1))
        traces.append(replay_chains(PreparedDrafter(drafter, Head(plain_target.head_weight), 5), context, short))
    for one, other in zip(*traces, strict=True):
        assert one.proposed.tolist() == other.proposed.tolist() and one.accepted.tolist() == other.accepted.tolist()
    assert tau(traces[0]) == tau(traces[1])


def test_other_kinds_are_not_upgraded(plain_target: Target, plain_drafter: object) -> None:
    chooser = random_dflash2(plain_target)
    assert upgrade_drafter(chooser, DFlashConfig(), plain_target, 0) is chooser
    assert upgrade_drafter(chooser, DFlash2Config(kind="dflash2"), plain_target, 0) is chooser
    assert upgrade_drafter(plain_drafter, DFlashConfig(), plain_target, 0) is plain_drafter  # type: ignore[arg-type]
