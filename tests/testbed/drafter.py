"""The test bed's drafter, and the artifacts that it was made from by the real stages (`make.py`)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from draftsmith.artifacts.tables.parquet import read_table, write_table
from draftsmith.artifacts.tables.schemas import PROMPTS
from tests.testbed import cache, target
from tests.testbed.context import RecordingContext


@dataclass(frozen=True)
class DrafterArtifacts:
    """Folders of complete artifacts, as the inputs of a stage: `{"target": made.target, "drafter": made.drafter}`.

    The target is served in float32, where replay and decoding are exact.
    """

    root: Path

    @property
    def target(self) -> Path:
        """Return the artifact of the target."""
        return self.root / "target"

    @property
    def prompts(self) -> Path:
        """Return the prompts: splits train, validation, heldout; held-out ones without a near-tie (`ties.py`)."""
        return self.root / "prompts"

    @property
    def rollout(self) -> Path:
        """Return the target's greedy answers to the training prompts."""
        return self.root / "rollout"

    @property
    def heldout(self) -> Path:
        """Return its greedy answers to the validation and held-out prompts, which the drafter was not trained on."""
        return self.root / "heldout"

    @property
    def drafter(self) -> Path:
        """Return the artifact of sft; the checkpoint is in its folder `drafter`."""
        return self.root / "drafter"

    def to_evaluate(self, **drafters: Path) -> dict[str, Path]:
        """Return the inputs of an evaluation of the drafter as `sft`, and of others."""
        inputs = {"target": self.target, "prompts": self.prompts, "trajectories": self.heldout}
        return {**inputs, "sft": self.drafter, **drafters}


def write_target(made: DrafterArtifacts, model: Path) -> None:
    """Run the stage `target` on a model's folder."""
    from draftsmith.stages.targets.stage import STAGE

    context = RecordingContext(made.target, made.root / "target.work")
    context.run(STAGE, source=str(model), dtype="float32")
    shutil.rmtree(context.work)


def keep_prompts(prompts: Path, folder: Path, heldout: set[str]) -> Path:
    """Write the artifact of `prompts` to `folder` with only these prompts in its held-out splits."""
    rows = read_table(prompts / "prompts.parquet", PROMPTS).to_pylist()
    folder.mkdir(parents=True, exist_ok=True)
    kept = [row for row in rows if row["split"] == "train" or row["prompt_id"] in heldout]
    write_table(folder / "prompts.parquet", PROMPTS, kept)
    return folder


def drafter_artifacts() -> DrafterArtifacts:
    """Return the shipped artifacts in the cache, and add the target's, which names the model's folder."""
    from draftsmith.stages.targets import body, config, info, stage
    from tests.testbed import drafter

    def build(folder: Path) -> None:
        shutil.copytree(target.shipped() / target.ARTIFACTS, folder, dirs_exist_ok=True)
        write_target(DrafterArtifacts(folder), target.target_folder())

    code, made_from = (config, info, body, stage, drafter), f"{target.shipped()} {target.sums()}"
    return DrafterArtifacts(cache.cached("artifacts-tiny", build, code=code, extra=made_from))
