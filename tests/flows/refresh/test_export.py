"""Export of a version in each layout."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.retention import exclusive_for_prune
from draftsmith.artifacts.tracking.registry import Version
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh import registry_commands
from draftsmith.flows.refresh.line import FASTEST_BLOCK
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.checkpoint import load_drafter, save_drafter
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.target.causal_lm import Target
from tests.testbed.artifacts import committed
from tests.testbed.random_target import random_drafter, write_artifact


def copied(folder: Path) -> Callable[[Path], object]:
    return partial(shutil.copytree, folder, dirs_exist_ok=True)


@pytest.fixture
def version(plain_target: Target, plain_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Version:
    """A version whose drafter and target are in the store."""
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    store = Store(tmp_path / "home" / "store")
    save_drafter(random_drafter(plain_target), tmp_path / "made" / DRAFTER_FOLDER, torch.float32)
    target = committed(store, "target", copied(plain_artifact))
    ref = committed(store, "opd", copied(tmp_path / "made"), inputs={"target": target})
    version = Version("line", 1, ref.uri, ref.stage, ref.key, ref.content_id)
    monkeypatch.setattr(registry_commands, "registry", lambda: SimpleNamespace(resolve=lambda _text: version))
    return version


def test_an_export_prints_the_servers_options(
    version: Version, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry_commands.export(Display(), "line", tmp_path / "trained")
    by = f"--speculative-algorithm DFLASH --speculative-draft-model-path {tmp_path}/"
    block = json.loads((tmp_path / "trained" / "config.json").read_text())["block_size"]
    assert f"for SGLang: {by}trained --speculative-num-draft-tokens {block}" in printed(capsys)
    cast("dict[str, str]", version.tags)[FASTEST_BLOCK] = "3"
    registry_commands.export(Display(), "line", tmp_path / "fastest")
    assert block != 3 and f"{by}fastest --speculative-num-draft-tokens 3" in printed(capsys)
    registry_commands.export(Display(), "line", tmp_path / "vllm", "speculators")
    assert "for vLLM: --speculative-config" in printed(capsys)


@pytest.mark.parametrize("promoted", [True, False])
def test_exporting_a_version_that_was_not_promoted_warns(
    promoted: bool, version: Version, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tags = {"promoted_at": "2026-03-01"} if promoted else {"decision": "tau fell"}
    cast("dict[str, str]", version.tags).update(tags)
    registry_commands.export(Display(), "line@1", tmp_path / "copy")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (not promoted)
    assert (tmp_path / "copy" / "config.json").is_file() and ("tau fell" in caplog.text) is not promoted


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("version")
def test_prune_waits_for_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pruned_meanwhile(_folder: Path) -> None:
        with pytest.raises(DraftsmithError, match=r"a run of .* is alive"), exclusive_for_prune(tmp_path / "home"):
            pass
        refused.append(True)

    refused: list[bool] = []
    monkeypatch.setattr(registry_commands, "apply_user_umask", pruned_meanwhile)
    registry_commands.export(Display(), "line", tmp_path / "out")
    assert refused == [True]


def test_each_layout_has_the_same_drafter(version: Version, plain_target: Target, tmp_path: Path) -> None:
    source = version.path / DRAFTER_FOLDER
    registry_commands.export(Display(), "line", tmp_path / "own")
    assert drafter_digest(tmp_path / "own") == drafter_digest(source)
    registry_commands.export(Display(), "line", tmp_path / "vllm", "speculators")
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == plain_target.info.source
    tensors = load_file(tmp_path / "vllm" / "model.safetensors")
    assert tensors["lm_head.weight"].equal(plain_target.head_weight)
    drafter, kept = (load_drafter(folder, plain_target) for folder in (tmp_path / "vllm", source))
    assert all(tensor.equal(kept.state_dict()[name]) for name, tensor in drafter.state_dict().items())


@pytest.mark.usefixtures("version")
def test_the_embedding_is_never_copied_from_another_target(plain_target: Target, tmp_path: Path) -> None:
    store = Store(tmp_path / "home" / "store")
    committed(store, "target", copied(write_artifact(tmp_path / "revised", seed=1)), force=True)
    registry_commands.export(Display(), "line", tmp_path / "vllm", "speculators")
    assert load_file(tmp_path / "vllm" / "model.safetensors")["lm_head.weight"].equal(plain_target.head_weight)
    (replaced,) = (store.root / "target").glob(".replaced-*")
    shutil.rmtree(replaced)
    with pytest.raises(DraftsmithError, match="the target that it was trained for"):
        registry_commands.export(Display(), "line", tmp_path / "none", "speculators")


def test_a_full_disk_leaves_no_partial_export(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def full(source: Any, target: Any, **options: Any) -> Any:
        if str(target).endswith("model.safetensors"):
            Path(target).write_bytes(b"a half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copy(source, target, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        with pytest.raises(DraftsmithError, match=r"exporting to .*/copy: the disk is full. Free some space"):
            registry_commands.export(Display(), "line", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    registry_commands.export(Display(), "line", tmp_path / "copy")
    assert drafter_digest(tmp_path / "copy") == drafter_digest(version.path / DRAFTER_FOLDER)


@pytest.mark.usefixtures("version")
def test_existing_files_are_an_error_and_stay(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for name, problem in (("file", "is a file"), ("full", "is not empty")):
        with pytest.raises(DraftsmithError, match=problem):
            registry_commands.export(Display(), "line", tmp_path / name)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [("a changed file", "has changed since it was written"), ("made again", "has other content now")],
)
def test_a_changed_artifact_is_neither_exported_nor_promoted(
    damage: str, reason: str, version: Version, plain_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damage == "a changed file":
        weights = version.path / DRAFTER_FOLDER / "model.safetensors"
        content = weights.read_bytes()
        weights.chmod(0o600)
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        shutil.rmtree(version.path)
        save_drafter(random_drafter(plain_target, 1), tmp_path / "other" / DRAFTER_FOLDER, torch.float32)
        committed(Store(tmp_path / "home" / "store"), "opd", copied(tmp_path / "other"))
    moved: list[Version] = []
    line = SimpleNamespace(
        rollback_event=lambda _version: None,
        resolve=lambda _text: version,
        complete_promotion=lambda _line: None,
        champion=lambda _line: None,
        promote=lambda promoted, **_fields: moved.append(promoted),
    )
    monkeypatch.setattr(registry_commands, "registry", lambda: line)
    with pytest.raises(DraftsmithError, match=reason):
        registry_commands.export(Display(), "line", tmp_path / "copy")
    with pytest.raises(DraftsmithError, match=reason):
        registry_commands.promote(Display(), "line@1", "", dry_run=False)
    with pytest.raises(DraftsmithError, match=reason):
        registry_commands.rollback(Display(), "line", "", dry_run=False)
    assert moved == [] and not (tmp_path / "copy").exists()
