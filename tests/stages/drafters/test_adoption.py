"""Adoption of a drafter for a new revision of its target: stage `sft` without a step, and stage `champion`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.drafting import AdoptedChampion
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.base import DrafterInfo
from draftsmith.stages.drafters.champion import STAGE as CHAMPION
from draftsmith.stages.drafters.champion import ChampionConfig
from draftsmith.stages.drafters.checkpoint import check_drafter, read_info, save_drafter, write_info
from draftsmith.stages.drafters.digest import WEIGHTS_FILE, drafter_digest
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import read_target_info, write_target_info
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.sft.stage import STAGE
from tests.stages.drafters.edits import set_fields, setting
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.random_target import random_drafter


def adopt(folder: Path, target: Path, drafter: Path, answers: Path) -> Path:
    """Run the stage; return the adopted checkpoint."""
    ctx = RecordingContext.under(folder, {"target": target, "drafter": drafter.parent, "trajectories": answers})
    STAGE.run(ctx, SftConfig(steps=0, adopt=True))
    return ctx.out / "drafter"


def test_a_drafter_is_adopted_for_another_revision_but_not_for_another_shape(
    tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    revision = Path(shutil.copytree(tiny_drafter.target, tmp_path / "revision"))
    set_fields("target.json", digest="0123456789abcdef" * 4)(revision)
    shipped, info = tiny_drafter.drafter / "drafter", read_target_info(revision)
    # whose config names the installed transformers, which is part of the digest
    old = adopt(tmp_path / "old", tiny_drafter.target, shipped, tiny_drafter.rollout)
    with pytest.raises(DraftsmithError, match="trained for the target"):
        check_drafter(old, info)
    new = adopt(tmp_path / "adopted", revision, old, tiny_drafter.rollout)
    check_drafter(new, info)
    assert drafter_digest(new) == drafter_digest(old)
    assert (new / WEIGHTS_FILE).read_bytes() == (shipped / WEIGHTS_FILE).read_bytes()
    assert read_info(new).parents == (*read_info(old).parents, drafter_digest(old))
    assert read_info(new).training["steps"] == 0

    other = Path(shutil.copytree(old, tmp_path / "other" / "drafter"))
    setting(num_target_layers=99)(other)
    with pytest.raises(DraftsmithError, match="num_target_layers"):
        adopt(tmp_path / "refused", revision, other, tiny_drafter.rollout)


def test_frequent_tokens_come_from_training_answers_alone(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    """A head of frequent tokens taken from held-out answers would fit these."""
    public = Path(shutil.copytree(tiny_drafter.drafter / "drafter", tmp_path / "public" / "drafter"))
    (public / "frequent_tokens.npy").unlink()
    for answers in (tiny_drafter.heldout, tiny_drafter.rollout):
        adopted = adopt(tmp_path / answers.name, tiny_drafter.target, public, answers)
        assert (adopted / "frequent_tokens.npy").is_file() is (answers == tiny_drafter.rollout)


@pytest.mark.parametrize(
    ("then", "now", "cause", "remedy"),
    [
        ({"kind": "package"}, {"dtype": "float32"}, "dtype float32 instead of bfloat16", "with dtype bfloat16, or"),
        ({"revision": "aa"}, {"revision": "bb"}, "revision bb instead of aa", "with revision aa, or"),
        ({}, {"tokenizer_digest": "b" * 64}, "tokenizer and chat template bbbbbbbbbbbb instead of", "chat template"),
        ({}, {"source": "Qwen/B"}, "source Qwen/B instead of Qwen/A", "with source Qwen/A, or"),
        ({"kind": "folder"}, {"dtype": "float32"}, "this target is 1111", "Choose a drafter of this target"),
    ],
)
def test_the_error_of_another_target_names_what_differs(
    then: dict[str, str], now: dict[str, str], cause: str, remedy: str, plain_artifact: Path, tmp_path: Path
) -> None:
    usual = {"source": "Qwen/A", "kind": "hub", "dtype": "bfloat16", "tokenizer_digest": "a" * 64}
    before = read_target_info(plain_artifact).model_copy(update={**usual, "digest": "0" * 64, **then})
    after = before.model_copy(update={"digest": "1" * 64, **now})
    (tmp_path / WEIGHTS_FILE).touch()
    (tmp_path / "config.json").write_text("{}")
    write_info(tmp_path, DrafterInfo().made_for(before))
    check_drafter(tmp_path, before)
    with pytest.raises(DraftsmithError) as raised:
        check_drafter(tmp_path, after)
    assert cause in str(raised.value) and remedy in str(raised.value)


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
    CHAMPION.run(ctx, config)
    taken = ctx.out / DRAFTER_FOLDER
    assert drafter_digest(taken) == digest
    assert ctx.json(AdoptedChampion.FILE) == {"target_changed": changed, "trained_for": then, "target": now}
    info = read_info(taken)
    assert (info.target_digest, info.parents) == (now, ("before", digest) if changed else ("before",))
    assert info.target_dtype == ("float32" if changed else "")
    assert any("the target has changed since version 3 was promoted" in line for line in ctx.logs) is changed

    with pytest.raises(DraftsmithError, match="a-line version 3"):
        CHAMPION.run(replace(ctx, out=tmp_path / "other"), config.model_copy(update={"drafter_digest": "1" * 64}))
