"""Taking a drafter over for a new revision of its target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import check_drafter, read_info
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.experiments.adoption import STAGE, AdoptionConfig
from draftsmith.stages.targets.info import read_target_info
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts


@pytest.fixture
def revision(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> Path:
    """The artifact of another revision of the same target."""
    folder = tmp_path / "revision"
    shutil.copytree(tiny_drafter.target, folder)
    info = json.loads((folder / "target.json").read_text())
    (folder / "target.json").write_text(json.dumps(info | {"digest": "0123456789abcdef" * 4}))
    return folder


def test_a_drafter_of_the_old_revision_is_refused_until_it_is_taken_over(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, revision: Path
) -> None:
    old, digest = tiny_drafter.drafter / "drafter", read_target_info(revision).digest
    with pytest.raises(DraftsmithError, match="made for the target"):
        check_drafter(old, digest)
    inputs = {"target": revision, "drafter": tiny_drafter.drafter}
    ctx = RecordingContext(tmp_path / "out", tmp_path / "work", inputs, 0)
    STAGE.run(ctx, AdoptionConfig())
    new = ctx.out / "drafter"
    check_drafter(new, digest)
    assert drafter_digest(new) == drafter_digest(old)
    assert read_info(new).parents == (*read_info(old).parents, drafter_digest(old))
    assert read_info(new).training == {"stage": "adoption", "trained_for": read_info(old).target_digest}


def test_a_drafter_of_another_shape_is_refused(tmp_path: Path, tiny_drafter: DrafterArtifacts, revision: Path) -> None:
    other = tmp_path / "other" / "drafter"
    shutil.copytree(tiny_drafter.drafter / "drafter", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_target_layers": config["num_target_layers"] + 1}))
    ctx = RecordingContext(tmp_path / "out", tmp_path / "work", {"target": revision, "drafter": other.parent}, 0)
    with pytest.raises(DraftsmithError, match="num_target_layers"):
        STAGE.run(ctx, AdoptionConfig())
