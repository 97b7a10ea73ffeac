"""Adoption of a drafter for a new revision of its target: stage `sft` without a step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import check_drafter, read_info
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.target.info import read_target_info
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.sft.stage import STAGE
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts

ADOPTED = SftConfig(steps=0, adopt=True)


@pytest.fixture
def revision(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> Path:
    """Return the artifact of another revision of the same target."""
    folder = tmp_path / "revision"
    shutil.copytree(tiny_drafter.target, folder)
    info = json.loads((folder / "target.json").read_text())
    (folder / "target.json").write_text(json.dumps(info | {"digest": "0123456789abcdef" * 4}))
    return folder


def test_a_drafter_of_another_revision_is_refused_unless_adopted(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, revision: Path
) -> None:
    old, digest = tiny_drafter.drafter / "drafter", read_target_info(revision).digest
    with pytest.raises(DraftsmithError, match="trained for the target"):
        check_drafter(old, digest)
    inputs = {"target": revision, "drafter": tiny_drafter.drafter, "trajectories": tiny_drafter.rollout}
    ctx = RecordingContext(tmp_path / "out", tmp_path / "work", inputs, 0)
    STAGE.run(ctx, ADOPTED)
    new = ctx.out / "drafter"
    check_drafter(new, digest)
    assert drafter_digest(new) == drafter_digest(old)
    assert read_info(new).parents == (*read_info(old).parents, drafter_digest(old))
    assert read_info(new).training["steps"] == 0


def test_a_drafter_of_another_shape_is_refused(tmp_path: Path, tiny_drafter: DrafterArtifacts, revision: Path) -> None:
    other = tmp_path / "other" / "drafter"
    shutil.copytree(tiny_drafter.drafter / "drafter", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_target_layers": config["num_target_layers"] + 1}))
    inputs = {"target": revision, "drafter": other.parent, "trajectories": tiny_drafter.rollout}
    ctx = RecordingContext(tmp_path / "out", tmp_path / "work", inputs, 0)
    with pytest.raises(DraftsmithError, match="num_target_layers"):
        STAGE.run(ctx, ADOPTED)


@pytest.mark.parametrize("measures", [False, True])
def test_frequent_tokens_come_from_training_answers_alone(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, measures: bool
) -> None:
    """A head of frequent tokens taken from held-out answers would fit these."""
    public = tmp_path / "public" / "drafter"
    shutil.copytree(tiny_drafter.drafter / "drafter", public)
    (public / "frequent_tokens.npy").unlink()
    answers = tiny_drafter.heldout if measures else tiny_drafter.rollout
    inputs = {"target": tiny_drafter.target, "drafter": public.parent, "trajectories": answers}
    ctx = RecordingContext(tmp_path / "out", tmp_path / "work", inputs, 0)
    STAGE.run(ctx, ADOPTED)
    assert (ctx.out / "drafter" / "frequent_tokens.npy").is_file() is not measures
