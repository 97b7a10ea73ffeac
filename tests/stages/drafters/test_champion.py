"""Stage `champion`: copies the registered drafter, and adopts it for a changed target."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.base import DrafterInfo
from draftsmith.stages.drafters.checkpoint import read_info, save_drafter
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.stage import RECORD, STAGE, ChampionConfig
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.info import read_target_info, write_target_info
from tests.testbed.context import RecordingContext
from tests.testbed.random_target import random_drafter


@pytest.mark.parametrize("changed", [False, True])
def test_a_champion_is_adopted_for_a_changed_target(
    changed: bool, plain_artifact: Path, plain_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    served, target = tmp_path / "served", tmp_path / "target"
    drafter, then = random_drafter(plain_target), plain_target.info.digest
    drafter.info = DrafterInfo(target_digest=then, target_source="then", parents=("before",))
    save_drafter(drafter, served, torch.float32)
    digest = drafter_digest(served)
    shutil.copytree(plain_artifact, target)
    now = "0" * 64 if changed else then
    write_target_info(read_target_info(target).model_copy(update={"digest": now}), target)

    config = ChampionConfig(line="a-line", version=3, folder=str(served), content_id="", drafter_digest=digest)
    ctx = RecordingContext.under(tmp_path / "taken", {"target": target})
    STAGE.run(ctx, config)
    taken = ctx.out / DRAFTER_FOLDER
    assert drafter_digest(taken) == digest
    assert json.loads((ctx.out / RECORD).read_text()) == {"target_changed": changed, "trained_for": then, "target": now}
    info = read_info(taken)
    assert (info.target_digest, info.parents) == (now, ("before", digest) if changed else ("before",))
    assert any("the target has changed since version 3 was promoted" in line for line in ctx.logs) is changed

    with pytest.raises(DraftsmithError, match="a-line version 3"):
        STAGE.run(replace(ctx, out=tmp_path / "other"), config.model_copy(update={"drafter_digest": "1" * 64}))
