"""Export of a version in each layout."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.retention import exclusive_for_prune
from draftsmith.artifacts.tracking.registry import Version
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh import registry_commands
from draftsmith.flows.refresh.promotion import version_tags
from draftsmith.flows.refresh.versions import CONFIDENCE, FASTEST_BLOCK
from draftsmith.stages.data.prompts.stage import PromptsConfig
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter, read_info, save_drafter
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed.artifacts import committed
from tests.testbed.dspark import random_dspark
from tests.testbed.eagle3 import random_eagle3
from tests.testbed.mtp import native_head, target_with_head
from tests.testbed.random_target import random_drafter, write_artifact

SOURCE = {"kind": "jsonl", "path": "prompts.jsonl"}
PROMPTS = PromptsConfig.model_validate({"sources": [SOURCE], "train": 1, "validation": 1, "heldout": 1})


def copied(folder: Path) -> Callable[[Path], object]:
    return partial(shutil.copytree, folder, dirs_exist_ok=True)


def version_of(drafter: Drafter, plain_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Version:
    """Register a drafter as a version, with its target in the store too."""
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    store = Store(tmp_path / "home" / "store")
    save_drafter(drafter, tmp_path / "made" / DRAFTER_FOLDER, torch.float32)
    target = committed(store, "target", copied(plain_artifact))
    ref = committed(store, "opd", copied(tmp_path / "made"), inputs={"target": target})
    version = Version("line", 1, ref.uri, ref.stage, ref.key, ref.content_id)
    monkeypatch.setattr(registry_commands, "registry", lambda: SimpleNamespace(resolve=lambda _text: version))
    return version


@pytest.fixture
def version(plain_target: Target, plain_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Version:
    return version_of(random_drafter(plain_target), plain_artifact, tmp_path, monkeypatch)


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


PLAIN_STEP = ("plain", 1, 1, 9.0)


def load_tags(
    version: Version,
    curve: list[tuple[int, int, float]],
    times: Sequence[tuple[str, int, int, float]] = (PLAIN_STEP,),
) -> None:
    """Give a version the tags of an evaluation with this curve: requests in flight, block size, speed-up - 1.

    times: of steps, by arm, requests in flight and block size, in ms; servers, timed with one block size, have none.
    """
    estimate = {"error": 0.02, "units": 5, "degrees": 4.0, "tokens_per_s": 1.0}
    points = [
        {**estimate, "arm": "opd", "other": "plain", "concurrency": n, "block_size": width, "value": value}
        for n, width, value in curve
    ]
    steps = [dict(zip(("arm", "concurrency", "block_size", "ms"), each, strict=True)) for each in times]
    fields = {"drafters": {"opd": {"tau": 2.0}}, "step_times": steps, "load": points}
    evaluation = EvaluationResult.model_validate(fields)
    decision = GateDecision(promote=True, outcome="promoted", challenger="opd")
    tags = version_tags(evaluation, decision, version.path, PROMPTS, {})
    cast("dict[str, str]", version.tags).update(tags)


CURVE = [(1, 5, 0.5), (2, 5, 0.3), (4, 3, 0.1), (8, 3, -0.1), (16, 2, -0.2)]


def test_blocks_by_load_are_in_vllms_config(
    version: Version, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_tags(version, CURVE)
    registry_commands.export(Display(), "line", tmp_path / "vllm", "speculators")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "for vLLM, by load: " in line]
    words = shlex.split(line.partition("by load: ")[2])
    config = json.loads(words[words.index("--speculative-config") + 1])
    assert config["num_speculative_tokens_per_batch_size"] == [[1, 3, 4], [4, 15, 2], [16, 16, 1]], "never 0"
    assert config["num_speculative_tokens"] == 4
    registry_commands.export(Display(), "line", tmp_path / "sglang")
    assert "by load" not in printed(capsys) and not (tmp_path / "sglang" / "sglang-adaptive.json").exists()
    load_tags(version, [(1, 5, 0.5), (16, 5, -0.2)], ())
    registry_commands.export(Display(), "line", tmp_path / "timed", "speculators")
    assert "by load" not in printed(capsys)


def test_blocks_by_load_of_an_eagle3_are_a_file_that_sglang_reads(
    plain_target: Target, plain_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    version = version_of(random_eagle3(plain_target), plain_artifact, tmp_path, monkeypatch)
    load_tags(version, CURVE)
    registry_commands.export(Display(), "line", tmp_path / "out")
    text = printed(capsys)
    assert f"--speculative-adaptive --speculative-adaptive-config {tmp_path}/out/sglang-adaptive.json" in text
    assert (
        "--speculative-num-steps 4 --speculative-eagle-topk 1 --speculative-num-draft-tokens 5 --speculative-ad" in text
    )
    written = json.loads((tmp_path / "out" / "sglang-adaptive.json").read_text())
    assert written == {n: {"candidate_steps": [steps]} for n, steps in (("1", 4), ("4", 2), ("16", 1))}
    assert drafter_digest(tmp_path / "out") == drafter_digest(version.path / DRAFTER_FOLDER)


def test_step_times_of_a_dspark_are_a_file_that_sglang_reads(
    plain_target: Target, plain_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """SGLang adds its parts: here drafting takes 1 ms and 2 ms, verifying 3 ms and more by tokens of all requests."""
    version = version_of(random_dspark(plain_target), plain_artifact, tmp_path, monkeypatch)
    plain = [(1, 1, 3.0), (1, 2, 4.0), (1, 4, 5.0), (2, 1, 4.2), (2, 2, 5.0), (2, 4, 7.0)]
    steps = [("plain", *each) for each in plain] + [("opd", 1, 4, 6.0), ("opd", 1, 2, 4.7), ("opd", 2, 4, 9.0)]
    load_tags(version, CURVE, steps)
    registry_commands.export(Display(), "line", tmp_path / "out")
    options = "--speculative-num-draft-tokens 5 --speculative-dspark-sps-table-path"
    text, path = printed(capsys), tmp_path / "out" / "sglang-step-times.json"
    assert "by load: SGLANG_RAGGED_VERIFY_MODE=compact --spec" in text and f"{options} {path}" in text
    written = json.loads(path.read_text())
    assert written.pop("theta_seconds") == pytest.approx([0, 0.0011, 0.002, 0.004])
    parts = {"bias_seconds": 0.003, "bs_probes": [1, 2], "alpha_seconds": [0.001, 0.002], "m_probes": [1, 2, 4, 8]}
    assert written == parts


@pytest.mark.parametrize("curve", [[], [(1, 5, -0.1), (2, 3, -0.2)], [(1, 2, 0.5)]])
def test_there_is_no_second_line_unless_several_loads_are_known_and_drafting_pays(
    curve: list[tuple[int, int, float]], version: Version, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_tags(version, curve)
    registry_commands.export(Display(), "line", tmp_path / "vllm", "speculators")
    assert "by load" not in printed(capsys)


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


def test_a_native_head_is_exported_alone_and_in_its_targets_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = target_with_head(tmp_path / "mimo", "mimo")
    trained = native_head(target)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.5)
    version = version_of(trained, tmp_path / "mimo" / "out", tmp_path, monkeypatch)
    registry_commands.export(Display(), "line", tmp_path / "head")
    assert drafter_digest(tmp_path / "head") == drafter_digest(version.path / DRAFTER_FOLDER)
    assert "--speculative-algorithm NEXTN" in capsys.readouterr().out
    registry_commands.export(Display(), "line", tmp_path / "stitched", "stitched")
    assert "--speculative-draft-model-path" not in capsys.readouterr().out
    stitched, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "stitched", tmp_path / "mimo/model")
    )
    changed = {name for name, tensor in stitched.items() if not tensor.equal(before[name])}
    assert changed == {name for name in before if ".mtp_layers." in name}


@pytest.mark.parametrize("layout", ["sglang", "speculators"])
@pytest.mark.parametrize("reads_token", [True, False])
def test_a_calibrated_export_has_other_confidences_and_the_same_proposals(
    layout: str,
    reads_token: bool,
    plain_target: Target,
    plain_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The logits are scale · logit + shift, in float32 within 1e-5 of the largest."""
    drafter = random_dspark(plain_target, confidence_reads_token=reads_token)
    version = version_of(drafter, plain_artifact, tmp_path, monkeypatch)
    scale, shift = 0.3, -1.25
    fields = {"scale": scale, "shift": shift, "fitted_on": 9, "decisions": 9, "confidence": 0.5, "accepted": 0.5}
    found = {"tau": 2.0, "confidence": {**fields, "error": 0.1, "error_calibrated": 0.01}}
    evaluation = EvaluationResult.model_validate({"drafters": {"opd": found, "sft": {"tau": 2.0}}})
    decision = GateDecision(promote=True, outcome="promoted", challenger="opd")
    tags = version_tags(evaluation, decision, version.path, PROMPTS, {})
    cast("dict[str, str]", version.tags).update(tags)
    headless = version_tags(evaluation, decision.model_copy(update={"challenger": "sft"}), version.path, PROMPTS, {})
    assert headless[CONFIDENCE] == ""
    registry_commands.export(Display(), "line", tmp_path / "plain", layout)
    registry_commands.export(Display(), "line", tmp_path / "out", layout, calibrated=True)
    plain, calibrated = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    assert plain.keys() == calibrated.keys()
    changed = {name for name in plain if not plain[name].equal(calibrated[name])}
    assert changed == {"confidence_head.proj.weight", "confidence_head.proj.bias"}
    assert (tmp_path / "plain" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()

    trained = version.path / DRAFTER_FOLDER
    assert drafter_digest(tmp_path / "out") != drafter_digest(tmp_path / "plain")
    assert read_info(tmp_path / "out").parents[-1] == drafter_digest(trained)
    before, after = (load_drafter(folder, plain_target) for folder in (trained, tmp_path / "out"))
    head = before.head_over(plain_target.head_weight, None)
    ids, anchors = torch.arange(40)[None] % 60, torch.arange(2, 38)[None]
    with torch.no_grad():
        context = before.encode(plain_target.features(ids, before.target_layer_ids), ids, torch.arange(40)[None])
        proposals = before.propose(context, ids[:, 2:38], anchors, before.block_size, head)
        assert proposals.equal(after.propose(context, ids[:, 2:38], anchors, before.block_size, head))
        hidden = before.block_hidden(context, proposals, anchors)
        expected = scale * before.confidence(hidden) + shift
        torch.testing.assert_close(
            after.confidence(hidden), expected, rtol=0, atol=1e-5 * float(before.confidence(hidden).abs().max())
        )


def test_a_confidence_that_was_not_calibrated_is_one_error(version: Version, tmp_path: Path) -> None:
    for tags in ({}, {CONFIDENCE: ""}):
        cast("dict[str, str]", version.tags).update(tags)
        with pytest.raises(DraftsmithError, match=r"was not calibrated: .* Export without"):
            registry_commands.export(Display(), "line", tmp_path / "out", calibrated=True)
    assert not (tmp_path / "out").exists()


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
