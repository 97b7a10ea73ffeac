"""The estimate of a training's memory against torch's tracker, which follows a real step in the models' shapes."""

from __future__ import annotations

from typing import Any

import pytest

from draftsmith.stages.drafters import block_attention
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.dflash2.config import DFlash2Config
from draftsmith.stages.drafters.dspark.config import DSparkConfig
from draftsmith.stages.drafters.eagle3.config import Eagle3Config
from draftsmith.stages.drafters.mtp.config import MtpConfig
from draftsmith.stages.targets.estimate import PROCESS_BYTES, AnswerCounts, StageUse
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.config import OpdConfig, SftConfig, TrainingConfig
from draftsmith.stages.training.estimate import row_bytes, training_memory
from tests.stages.training.fake_step import FakeStep

DFLASH = DFlashConfig(mask_token=151669)
DFLASH2 = DFlash2Config(kind="dflash2", mask_token=151669)
DSPARK = DSparkConfig(kind="dspark", mask_token=151669, block_size=16)
EAGLE3 = Eagle3Config(kind="eagle3", draft_vocab_size=32000)
MTP = MtpConfig(kind="mtp")
CHUNKS: dict[str, Any] = {"positions_per_chunk": 32}  # fewer than a row of short chains has
SMALL: dict[str, Any] = {"sequences_per_step": 3, "anchors_per_sequence": 32, "micro_batch_tokens": 1}
IN_CHAINS = {  # a round of 8 blocks has more positions than a chunk
    "anchors": "chains", "loss": {"response": {"loss": "cross_entropy"}}, "positions_per_chunk": 64,
}  # fmt: skip
ADAPTED: dict[str, DFlashConfig | Eagle3Config] = {
    "DFlash": DFLASH, "DFlash2": DFLASH2, "DSpark": DSPARK, "EAGLE-3": EAGLE3,
}  # fmt: skip


def of(drafter: DFlashConfig | Eagle3Config, sampling: SamplingParams = GREEDY, **fields: Any) -> FakeStep:
    """Return a step of SFT for the target of 0.6B parameters. fields: of its config."""
    return FakeStep("Qwen3-0.6B", SftConfig.model_validate(SMALL | fields), drafter, 1024, sampling=sampling)


# all ten: python -m tests.benchmarks.memory
STEPS = {
    "0.6B, DFlash, SFT": of(DFLASH),
    "0.6B, EAGLE-3, SFT": of(EAGLE3),
    "0.6B, DFlash2, SFT": of(DFLASH2),
    "0.6B, native head, SFT": FakeStep("with a head", SftConfig.model_validate(SMALL | CHUNKS), MTP, 1024),
    "0.6B, DFlash, whole distribution": of(DFLASH, loss="ce_l1"),
    "0.6B, DSpark, SFT": of(DSPARK, SamplingParams(0.7)),
    "0.6B, DSpark, SFT, top-p": of(DSPARK, SamplingParams(0.7, 0.9)),
    "0.6B, DSpark, SFT, top-k and top-p": of(DSPARK, SamplingParams(0.7, 0.9, 20)),
    **{
        f"0.6B, {name}, adapter": of(drafter, SamplingParams(0.7, 0.9), lora={"rank": 64})
        for name, drafter in ADAPTED.items()
    },
    "0.6B, DFlash, OPD in chains": FakeStep("Qwen3-0.6B", OpdConfig.model_validate(SMALL | IN_CHAINS), DFLASH, 1024),
    "4B, DFlash, OPD": FakeStep("Qwen3-4B", OpdConfig.model_validate(SMALL | {"loss": "paper"}), DFLASH, 1024),
}
WITHIN = 0.15


def estimated_and_tracked(
    step: FakeStep, device_memory: float, mask_entries: int = block_attention._MASK_ENTRIES
) -> tuple[float, float, int]:
    """Return the estimated bytes of tensors, the tracked bytes, and the rows of a micro-batch."""
    config: TrainingConfig = step.config
    sizes = step.sizes(device_memory)
    parts = training_memory(config, StageUse(sizes, answers=AnswerCounts(step.longest)))
    rows = round(parts["activations"] / row_bytes(config, sizes, step.longest))
    return sum(parts.values()) - PROCESS_BYTES, step.peak_bytes(rows, mask_entries), rows


@pytest.mark.parametrize("name", STEPS)
def test_the_estimate_is_close_to_what_torch_tracks(name: str) -> None:
    estimated, tracked, rows = estimated_and_tracked(STEPS[name], 80e9)
    assert rows == 1
    assert estimated == pytest.approx(tracked, rel=WITHIN)
