"""Memory of a training step on one device: the estimate of `draftsmith check` against torch's tracker.

Steps of the paper's size (21 answers of up to 4,096 tokens after prompts of 512, 512 anchors each) in the shapes of
Qwen3-4B and 8B, and others. Nothing is allocated: `tests/stages/training/fake_step.py` says how. Rows of a
micro-batch are as many as the estimate lets fit a device of `--device-gb`.
"""

from __future__ import annotations

from typing import Any

from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.eagle3.config import Eagle3Config
from draftsmith.stages.training.config import OpdConfig, SftConfig
from tests.benchmarks import harness
from tests.stages.training.fake_step import FakeStep
from tests.stages.training.test_memory import DFLASH, EAGLE3, estimated_and_tracked

PAPER: dict[str, Any] = {"sequences_per_step": 21, "anchors_per_sequence": 512}
T = 512 + 4096
_opd, _sft = OpdConfig.model_validate, SftConfig.model_validate
MASK_ENTRIES = 2**26  # few large groups of blocks: 128 MB of mask, minutes instead of an hour
STEPS = {
    "4B, DFlash, OPD paper": FakeStep("Qwen3-4B", _opd(PAPER | {"loss": "paper"}), DFLASH, T),
    "8B, DFlash, OPD paper": FakeStep("Qwen3-8B", _opd(PAPER | {"loss": "paper"}), DFLASH, T),
    "4B, EAGLE-3, OPD": FakeStep("Qwen3-4B", _opd(PAPER), EAGLE3, T),
    "8B, EAGLE-3, OPD": FakeStep("Qwen3-8B", _opd(PAPER), EAGLE3, T),
    "4B, DFlash, SFT": FakeStep("Qwen3-4B", _sft(PAPER), DFLASH, T),
    "4B, DFlash, SFT, 64 anchors": FakeStep("Qwen3-4B", _sft(PAPER | {"anchors_per_sequence": 64}), DFLASH, T),
    "4B, DFlash, forward KL, short": FakeStep(
        "Qwen3-4B", _sft({"sequences_per_step": 8, "anchors_per_sequence": 128, "loss": "forward_kl"}), DFLASH, 1024
    ),
    "4B, DFlash of 2 layers, blocks of 8": FakeStep(
        "Qwen3-4B",
        _sft({"sequences_per_step": 8, "anchors_per_sequence": 64}),
        DFlashConfig(num_layers=2, block_size=8, mask_token=151669),
        2048,
    ),
    "0.6B, DFlash, SFT in float32": FakeStep(
        "Qwen3-0.6B",
        _sft({"sequences_per_step": 4, "anchors_per_sequence": 64, "compute_dtype": "float32"}),
        DFLASH,
        1024,
    ),
    "0.6B, EAGLE-3, SFT, whole vocabulary": FakeStep(
        "Qwen3-0.6B",
        _sft({"sequences_per_step": 8, "anchors_per_sequence": 64}),
        Eagle3Config(kind="eagle3"),
        1024,
    ),
}


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--device-gb", type=float, default=80.0)
    options.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    chosen = options.parse_args()
    rows = []
    for name in chosen.steps:
        estimated, tracked, at_once = estimated_and_tracked(STEPS[name], 1e9 * chosen.device_gb, MASK_ENTRIES)
        rows.append(
            {
                "step": name,
                "answers_at_once": at_once,
                "estimated_gb": estimated / 1e9,
                "tracked_gb": tracked / 1e9,
                "estimated_of_tracked": estimated / tracked,
            }
        )
        print(rows[-1], flush=True)
    harness.print_rows("Training steps", rows)
    harness.report("memory", {"rows": rows}, chosen)


if __name__ == "__main__":
    harness.run(main)
