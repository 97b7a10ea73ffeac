"""A refresh of a stale native head: SFT and OPD on the answers of the fine-tuned target (`README.md`).

    python -m tests.lab.native_refresh [--steps 150]

The target is the test bed's with its shipped head, and the fine-tune its shipped revision. Both arms continue the stale
head for as many steps, with the same answers, blocks and rate, for three seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.engines.stage import STAGE as ROLLOUT
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.opd.stage import STAGE as OPD
from draftsmith.stages.training.sft.stage import STAGE as SFT
from tests.lab.benchmark import Row, compare, tau
from tests.testbed import native, target
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import drafter_artifacts
from tests.testbed.make import ANSWER_TOKENS

SEEDS = (0, 1, 2)
SHARED: dict[str, Any] = {
    "sequences_per_step": 8,
    "anchors_per_sequence": 16,
    "learning_rate": 1e-3,
    "compute_dtype": "float32",
}


def measured(tuned: Target, drafter: Path, answers: Path) -> Row:
    """Replay a drafter on held-out answers; return the tokens committed in each of them, and its verify steps."""
    stored = load_trajectories(answers)
    loaded = {"it": load_drafter(drafter / DRAFTER_FOLDER, tuned, any_target=True)}
    options = ReplayOptions(sampling=stored.sampling, with_proposals=False)
    stats = Replayer(tuned, options).acceptance(loaded, stored.trajectories)["it"]
    return {"committed": stats.committed.tolist(), "verify_steps": stats.steps.tolist()}


def play(folder: Path, steps: int) -> None:
    """Make target, answers and drafters under `folder`, and print the table."""
    made = drafter_artifacts()
    before = native.target_with_head(folder / "before")
    stale = native.taken_head(made, before, folder / "stale")
    after = native.artifact_of(native.write_glm(target.revision_folder(), folder / "model"), folder / "after")
    answers = {}
    for split in ("train", "heldout"):
        context = RecordingContext.under(folder / split, {"target": after, "prompts": made.prompts})
        sampling = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0.0}
        answers[split] = context.run(ROLLOUT, splits=[split], sampling=sampling, engine={"slots": 32}).out
    inputs = {"target": after, "trajectories": answers["train"], "drafter": stale}
    adopted = RecordingContext.under(folder / "adopted", inputs).run(SFT, steps=0, adopt=True, drafter={"kind": "mtp"})
    inputs["drafter"] = adopted.out
    tuned = Target.load(after, device="cpu")
    rows: dict[str, dict[tuple[int, int], list[Row]]] = {}
    for seed in SEEDS:
        sft = RecordingContext.under(folder / f"sft-{seed}", inputs, seed)
        opd = RecordingContext.under(folder / f"opd-{seed}", inputs, seed)
        trained = {
            "stale": stale,
            "SFT": sft.run(SFT, steps=steps, drafter={"kind": "mtp"}, **SHARED).out,
            "OPD": opd.run(OPD, steps=steps, anchors="chains", **SHARED).out,
        }
        for arm, artifact in trained.items():
            row = measured(tuned, artifact, answers["heldout"])
            rows.setdefault(arm, {})[0, seed] = [row]
            print(f"seed {seed}, {arm}: tau {tau(row):.3f}", flush=True)
    for arm, other in (("SFT", "stale"), ("OPD", "stale"), ("OPD", "SFT")):
        gain = compare(rows[arm], rows[other])
        low, high = (gain.base * end for end in gain.interval)
        print(f"{arm} to {other}: {gain.difference:+.3f} of {gain.base:.3f}, [{low:+.3f}, {high:+.3f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of SFT, and of OPD")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        play(Path(folder), options.steps)


if __name__ == "__main__":
    main()
