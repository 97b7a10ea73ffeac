"""What validators of configs say of a run as a whole: what it measures at its end is made at its beginning."""

from __future__ import annotations

from draftsmith.stages.measure.config import EvaluationConfig
from draftsmith.stages.prompting.sources import SPLITS, Split
from draftsmith.stages.prompts import PromptsConfig
from draftsmith.stages.rollout import RolloutConfig


def require_measurable(
    heldout: RolloutConfig, prompts: PromptsConfig, *, evaluation: EvaluationConfig | None = None
) -> None:
    """What the last stage reads must be made by the first ones: answers to held-out prompts, and the validation prompts
    that the block size is chosen on.

    Raises ValueError (for validators of configs).
    """
    if "heldout" not in heldout.splits:
        raise ValueError(
            f"heldout.splits: {list(heldout.splits)} lacks heldout, which drafters are measured on: add it"
        )
    needed: dict[Split, str] = {"heldout": "heldout.splits"}
    if evaluation is not None and evaluation.block_sizes:
        needed["validation"] = "evaluation.block_sizes"
    for split, reader in needed.items():
        if prompts.wanted(split) == 0:
            raise ValueError(f"prompts.{split}: {reader} needs prompts of this split: give their number")
    counts = heldout.counts({split: prompts.wanted(split) for split in SPLITS})
    if not counts["heldout"]:
        raise ValueError(
            "heldout: skip and prompts leave out all of split heldout, which drafters are measured on (in the order "
            f"{', '.join(SPLITS)}): change them, or lower the counts in section prompts instead"
        )
