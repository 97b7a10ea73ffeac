"""What validators of configs say of a run as a whole: what it measures at its end is made at its beginning."""

from __future__ import annotations

from collections.abc import Sequence

from draftsmith.stages.measure.config import EvaluationConfig
from draftsmith.stages.prompting.sources import SPLITS
from draftsmith.stages.prompts import PromptsConfig
from draftsmith.stages.rollout import RolloutConfig


def require_measurable(
    heldout: RolloutConfig,
    prompts: PromptsConfig,
    *,
    answered: Sequence[str] = ("heldout",),
    evaluation: EvaluationConfig | None = None,
) -> None:
    """What the last stage reads must be made by the first ones: answers to prompts of some splits, and the validation
    prompts that the block size is chosen on.

    Raises ValueError (for validators of configs).
    """
    needed = dict.fromkeys(answered, "heldout.splits")
    for split in needed:
        if split not in heldout.splits:
            raise ValueError(
                f"heldout.splits: {list(heldout.splits)} lacks {split}, which drafters are measured on: add it"
            )
    if evaluation is not None and evaluation.block_sizes:
        needed["validation"] = "evaluation.block_sizes"
    for split, reader in needed.items():
        if split in SPLITS and prompts.wanted(split) == 0:
            raise ValueError(f"prompts.{split}: {reader} needs prompts of this split: give their number")
    counts = heldout.counts({split: prompts.wanted(split) for split in SPLITS})
    for split in answered:
        if not counts.get(split, 1):
            raise ValueError(
                f"heldout: skip and prompts leave out all of split {split}, which drafters are measured on (in the "
                f"order {', '.join(SPLITS)}): change them, or lower the counts in section prompts instead"
            )
