"""A DFlash2 drafter of random weights for the test bed's target of random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.testbed.random_target import MASK, WIDTH, randomise

if TYPE_CHECKING:
    from draftsmith.stages.drafters.dflash2.model import DFlash2Drafter
    from draftsmith.stages.targets.causal_lm import Target

SIZES: dict[str, Any] = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 7}


def random_dflash2(target: Target, seed: int = 0, **fields: Any) -> DFlash2Drafter:
    """Return a small drafter of 2 layers, block 5, target layers 2 and 0, with large random weights.

    fields: of the checkpoint's config, such as `windows(3)`; those of SIZES within `dflash_config`.
    """
    from draftsmith.stages.drafters.dflash2 import checkpoint
    from draftsmith.stages.drafters.dflash2.config import DFlash2Config
    from draftsmith.stages.drafters.dflash2.model import DFlash2Drafter

    shape = DFlash2Config(kind="dflash2", num_layers=2, block_size=5, target_layer_ids=(2, 0), mask_token=MASK)
    config = checkpoint.new_config(shape, target.model.config, lambda: target.tokenizer)
    config.dflash_config |= {name: fields.pop(name, size) for name, size in SIZES.items()}
    config.update({"intermediate_size": WIDTH, **fields})
    drafter = DFlash2Drafter(config, target.embedding)
    randomise(drafter, seed)
    return drafter.eval()
