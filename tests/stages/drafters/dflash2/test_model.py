"""DFlash2 against plain loops, and upgrades from DFlash."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftsmith.stages.drafters.checkpoint import upgrade_drafter
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.dflash2.config import DFlash2Config
from draftsmith.stages.drafters.dflash2.model import DFlash2Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.drafters.dflash import reference
from tests.stages.drafters.dflash2 import reference as additions
from tests.stages.drafters.texts import Texts
from tests.testbed import random_target
from tests.testbed.dflash2 import random_dflash2

TOLERANCE = 5e-5  # float32 against float64 on values of order one to ten
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize("window", [None, 4])
def test_hidden_states_and_proposals_equal_the_float64_reference(window: int | None, plain_target: Target) -> None:
    fields: dict[str, Any] = {"conv_kernel_size": 6}  # longer than a block, of which nothing is before the first token
    if window is not None:
        fields = random_target.windows(window, SLIDING, FULL)
    drafter = random_dflash2(plain_target, **fields)
    texts, anchors = Texts(plain_target, drafter, count=1, seed=3), torch.tensor([[4, 9, 7]])
    context, chains, head = texts.context(), texts.chains(anchors), plain_target.head_weight
    with torch.no_grad():
        hidden = drafter.block_hidden(context, chains, anchors)
    proposed = drafter.propose(context, chains[..., 0], anchors, 5, Head(head))
    seen: dict[str, Any] = {"windows": [window, None], "causal": [window is not None, False]}
    for index, anchor in enumerate(anchors[0].tolist()):
        expected = reference.hidden_of(texts, anchor, around=additions.around, **seen)
        torch.testing.assert_close(hidden[0, index].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
        walked = additions.path(dict(drafter.named_parameters()), expected, head, int(chains[0, index, 0]), 7)
        assert proposed[0, index].tolist() == walked
        assert walked != (expected @ head.double().T).argmax(-1).tolist(), "pairs decide"


def test_an_upgrade_from_dflash_has_the_same_proposals(plain_target: Target) -> None:
    plain = random_target.random_drafter(plain_target, **random_target.windows(6, SLIDING, FULL))
    plain.frequent_tokens = torch.arange(random_target.VOCAB_SIZE)
    shape = DFlash2Config(kind="dflash2", num_layers=7, block_size=3)
    upgrade = upgrade_drafter(plain, shape, plain_target, seed=0)
    assert isinstance(upgrade, DFlash2Drafter)
    assert (upgrade.block_size, upgrade.target_layer_ids, len(upgrade.layers)) == (5, [2, 0], 2), "its own shape stays"
    assert upgrade.frequent_tokens is plain.frequent_tokens and upgrade.spans == plain.spans
    traces = Replayer(plain_target).traces({"plain": plain, "upgrade": upgrade}, random_target.trajectories(4, seed=2))
    for one, other in zip(*traces.values(), strict=True):
        assert one.proposed.tolist() == other.proposed.tolist() and one.accepted.tolist() == other.accepted.tolist()


def test_other_kinds_are_not_upgraded(plain_target: Target, plain_drafter: object) -> None:
    chooser = random_dflash2(plain_target)
    assert upgrade_drafter(chooser, DFlashConfig(), plain_target, 0) is chooser
    assert upgrade_drafter(chooser, DFlash2Config(kind="dflash2"), plain_target, 0) is chooser
    assert upgrade_drafter(plain_drafter, DFlashConfig(), plain_target, 0) is plain_drafter  # type: ignore[arg-type]
