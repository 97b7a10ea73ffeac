"""DSpark drafters of random weights for the test bed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.testbed.random_target import MASK, WIDTH, randomise

if TYPE_CHECKING:
    from draftsmith.stages.drafters.dspark.model import DSparkDrafter
    from draftsmith.stages.targets.causal_lm import Target


def random_dspark(
    target: Target,
    seed: int = 0,
    *,
    from_anchor: bool = True,
    confidence_head: bool = True,
    confidence_reads_token: bool = True,
    target_layer_ids: tuple[int, ...] = (2, 0),
) -> DSparkDrafter:
    """Return a drafter of 2 layers, block 5, a bias of rank 6, with large random weights."""
    from draftsmith.stages.drafters.dspark import checkpoint
    from draftsmith.stages.drafters.dspark.config import DSparkConfig

    shape = DSparkConfig(
        kind="dspark",
        num_layers=2,
        block_size=5,
        target_layer_ids=target_layer_ids,
        mask_token=MASK,
    )
    config = checkpoint.new_config(shape, target.model.config, lambda: target.tokenizer)
    config.intermediate_size, config.markov_rank, config.enable_confidence_head = WIDTH, 6, confidence_head
    config.sample_from_anchor, config.confidence_head_with_markov = from_anchor, confidence_reads_token
    drafter = checkpoint.create(config, target)
    randomise(drafter, seed, large="markov_w")
    return drafter.eval()
