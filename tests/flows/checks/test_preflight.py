"""Checks during a run: the first error stops it before any long stage."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.checks import models
from draftsmith.flows.checks.engines import check_engines
from draftsmith.flows.checks.findings import Findings, Level, RaisingFindings
from draftsmith.flows.checks.models import DrafterPlans, check_drafters, check_stage_settings
from draftsmith.flows.checks.prompts import check_lengths, check_prompt_counts
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.data.stored_prompts import load_prompts
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.checkpoint import read_info
from draftsmith.stages.targets.info import read_target_info
from tests.flows.toy import ToyConfig, toy_nodes
from tests.flows.toy_stages.combine import CombineConfig
from tests.stages.drafters.edits import setting
from tests.testbed import native
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.refresh import node_of
from tests.testbed.target import MASK


def check_target(nodes: list[Node], target: Path) -> None:
    """Make the checks that a run makes once it has the target."""
    check_drafters(RaisingFindings(), nodes, target, whole=True)
    check_stage_settings(RaisingFindings(), nodes, target)


def test_every_stage_checks_its_config_against_the_target(tmp_path: Path) -> None:
    check_target(toy_nodes(ToyConfig(name="t")), tmp_path)
    bad = ToyConfig(name="t", total=CombineConfig(factor=0))
    with pytest.raises(DraftsmithError, match="total: factor: 0 makes every sum 0"):
        check_target(toy_nodes(bad), tmp_path)


LEARNED = {"target": "target", "trajectories": "rollout"}


def test_sft_that_continues_a_drafter_is_not_checked_as_a_new_one(tiny_drafter: DrafterArtifacts) -> None:
    """The control of a refresh has section sft, but does not train the drafter that the section describes."""
    new = {"mask_token": "<never>"}
    check_target([node_of("sft", {**LEARNED, "drafter": "sft"}, "control", drafter=new)], tiny_drafter.target)
    with pytest.raises(DraftsmithError, match=r"sft: drafter: .*'<never>' is not a token of the target"):
        check_target([node_of("sft", LEARNED, drafter=new)], tiny_drafter.target)


def test_a_drafter_that_cannot_be_continued_is_refused_before_work(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good = tiny_drafter.drafter / DRAFTER_FOLDER
    check_target([node_of("sft", LEARNED, init_from=str(good))], tiny_drafter.target)
    other, whole = (Path(shutil.copytree(good, tmp_path / name)) for name in ("other", "without weights"))
    info = (other / "drafter.json").read_text()
    (other / "drafter.json").write_text(info.replace(read_info(good).target_digest, "0" * 64))
    (whole / "model.safetensors").rename(whole / "pytorch_model.bin")
    shape = {"block_size": 4, "num_layers": 1}
    for fields, message in (
        ({"init_from": "/no/such/folder"}, "init_from"),
        ({"init_from": str(other)}, "adopt"),
        ({"init_from": str(whole)}, r"model\.safetensors"),
        ({"drafter": {**shape, "mask_token": "<absent>"}}, "<absent>"),
        ({"drafter": {**shape, "mask_token": MASK, "target_layer_ids": [1, 4]}}, "layer"),
        ({"adopt": True, "steps": 0}, "0 steps train nothing"),
    ):
        with pytest.raises(DraftsmithError, match=message):
            check_target([node_of("sft", LEARNED, **fields)], tiny_drafter.target)
    check_target([node_of("sft", LEARNED, init_from=str(other), adopt=True)], tiny_drafter.target)


@pytest.mark.parametrize(
    ("fields", "errors"), [({"skip": 8}, 1), ({"skip": 3, "prompts": 6}, 1), ({"skip": 3, "prompts": 5}, 0), ({}, 0)]
)
def test_a_rollout_with_too_few_prompts_is_an_error(fields: dict[str, int], errors: int) -> None:
    sources = [{"kind": "jsonl", "path": "p.jsonl"}]
    prompts = node_of("prompts", {"target": "target"}, sources=sources, train=8, validation=0, heldout=2)
    findings = Findings()
    check_prompt_counts(findings, [prompts, node_of("rollout", {"target": "target", "prompts": "prompts"}, **fields)])
    assert findings.errors == errors


@pytest.mark.parametrize(
    ("section", "kind", "noted"),
    [
        ({}, "dflash", False),
        ({"kind": "dflash2"}, "dflash2", False),
        ({"num_layers": 3}, "dflash", True),
        ({"kind": "eagle3"}, "dflash", True),
    ],
)
def test_section_drafter_beside_a_checkpoint_is_used_only_for_a_change_of_kind(
    section: dict[str, Any], kind: str, noted: bool, tiny_drafter: DrafterArtifacts
) -> None:
    sft = node_of("sft", LEARNED, init_from=str(tiny_drafter.drafter / "drafter"), **in_section(section))
    findings = Findings()
    plans = check_drafters(findings, [sft], tiny_drafter.target, whole=True)
    assert plans["sft"].kind == kind
    assert any("section drafter is not used" in line.text for line in findings.lines) == noted


def in_section(drafter: dict[str, Any]) -> dict[str, Any]:
    return {"drafter": drafter} if drafter else {}


def test_every_node_is_checked_against_the_drafter_that_it_reads(tiny_drafter: DrafterArtifacts) -> None:
    """Only one of two drafters was trained with blocks that large."""
    shape = {"block_size": 4, "mask_token": MASK, "num_layers": 1, "target_layer_ids": [0, 2]}
    eagle = {"kind": "eagle3", "block_size": 8, "target_layer_ids": [0, 1, 2]}

    def nodes(name: str, block_size: int) -> list[Node]:
        return [
            node_of("sft", LEARNED, "small", drafter=shape),
            node_of("sft", LEARNED, "large", drafter=eagle),
            node_of("sft", {**LEARNED, "drafter": name}, "more"),
            node_of("mining", {**LEARNED, "drafter": "more"}, drafting={"block_size": block_size}),
        ]

    check_target(nodes("large", 8), tiny_drafter.target)
    with pytest.raises(DraftsmithError, match=r"mining: .* 8 is larger than the trained 4"):
        check_target(nodes("small", 8), tiny_drafter.target)


def test_sampling_with_a_drafter_on_cpu_servers_is_an_error() -> None:
    engine = {"kind": "sglang", "python": "python", "launch": {"options": {"device": "cpu"}}}
    drafts, sampled = {"drafter": "sft"}, {"engine": engine, "sampling": {"temperature": 1}}
    for node, message in (
        (
            node_of("evaluation", drafts, "speed", engine=engine, temperatures=[0, 1]),
            "speed: temperatures: SGLang verifies greedily on this device",
        ),
        (node_of("rollout", drafts, "assisted", **sampled), r"assisted: sampling\.temperature"),
        (node_of("rollout", **sampled), r"sglang \(rollout\): engine\.python"),  # without a drafter it may sample
    ):
        with pytest.raises(DraftsmithError, match=message):
            check_engines(RaisingFindings(), [node])


@pytest.mark.parametrize(
    ("kind", "options", "errors"),
    [("dflash", {}, 1), ("dspark", {}, 1), ("eagle3", {}, 0), ("dflash", {"device": "cpu"}, 0)],
)
def test_drafters_of_blocks_are_served_in_bfloat16_alone(
    kind: str, options: dict[str, str], errors: int, tiny_drafter: DrafterArtifacts
) -> None:
    """The target is float32."""
    shape = {"kind": kind, "block_size": 4, "target_layer_ids": [0, 1, 2]}
    shape |= {} if kind == "eagle3" else {"mask_token": MASK, "num_layers": 1}
    asked = {"target": "target", "prompts": "prompts", "drafter": "sft"}
    engine = {"kind": "sglang", "launch": {"options": options}}
    nodes = [node_of("sft", LEARNED, drafter=shape), node_of("rollout", asked, "assisted", engine=engine)]
    findings = Findings()
    assert "sft" in check_drafters(findings, nodes, tiny_drafter.target, whole=False)
    found = [line.text for line in findings.lines if (line.check, line.level) == ("assisted", Level.ERROR)]
    assert len(found) == errors and all("target.dtype: float32" in text for text in found)


def test_a_target_with_a_native_head_is_told(tiny_drafter: DrafterArtifacts, tmp_path: Path) -> None:
    def told(artifact: Path) -> list[tuple[Level, str]]:
        findings = Findings()
        models.check_target(findings, [], artifact)
        return [(line.level, line.text) for line in findings.lines if line.check == "native head"]

    with_head = native.target_with_head(tmp_path)
    assert told(with_head) == [(Level.OK, "this target has an MTP head; a new drafter must beat it (arm native)")]
    assert told(tiny_drafter.target) == []
    setting(num_nextn_predict_layers=2)(tmp_path / "model")
    ((level, text),) = told(with_head)
    assert level is Level.WARNING and "no evaluation measures" in text and "only heads of one layer" in text


def test_mxfp4_weights_that_would_be_expanded_are_a_warning(
    plain_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Path(shutil.copytree(plain_artifact, tmp_path / "target"))
    info = json.loads((artifact / "target.json").read_text())
    (artifact / "target.json").write_text(json.dumps(info | {"quantisation": "mxfp4"}))

    def warnings() -> list[str]:
        findings = Findings()
        models.check_target(findings, [], artifact)
        return [line.text for line in findings.lines if line.level is Level.WARNING]

    monkeypatch.setitem(sys.modules, "kernels", None)  # transformers itself needs the package since 5.25
    (warning,) = warnings()
    assert "pip install kernels" in warning
    monkeypatch.delitem(sys.modules, "kernels")
    (tmp_path / "kernels.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert warnings() == []


def test_prompts_that_are_too_long_for_a_stage_are_an_error(tiny_drafter: DrafterArtifacts) -> None:
    limit = read_target_info(tiny_drafter.target).max_positions
    longest = max(len(prompt.token_ids) for prompt in load_prompts(tiny_drafter.prompts, ["heldout"]))
    for stage, fields in (("rollout", {"splits": ["heldout"]}), ("evaluation", {"validation_prompts": 1})):
        for over in (0, 1):
            sampling = {"max_new_tokens": limit - longest + over}
            node = node_of(stage, {"prompts": "prompts"}, "late", sampling=sampling, **fields)
            findings = Findings()
            for name in ("prompts", "other_prompts"):
                check_lengths(findings, [node], name, tiny_drafter.prompts, limit)
            assert [line.check for line in findings.lines] == ["late"] * over


def champion(folder: Path) -> Node:
    serves = {"line": "line", "version": 3, "folder": str(folder), "content_id": "c", "drafter_digest": "d"}
    return node_of("champion", {"target": "target"}, **serves)


CONTINUED = {**LEARNED, "drafter": "champion"}


def test_settings_are_checked_against_the_champions_drafter(tiny_drafter: DrafterArtifacts) -> None:
    def plans_of(folder: Path, **fields: Any) -> DrafterPlans:
        assisted = node_of("rollout", {"target": "target", "drafter": "sft"}, "assisted", **fields)
        nodes = [champion(folder), node_of("sft", CONTINUED), assisted]
        return check_drafters(RaisingFindings(), nodes, tiny_drafter.target, whole=True)

    checkpoint = tiny_drafter.drafter / DRAFTER_FOLDER
    (plan,) = plans_of(checkpoint).values()
    assert plan.parameters > 0 and plan.kind == "dflash"
    with pytest.raises(DraftsmithError, match=f"assisted: drafting.block_size: 99 is larger .* {plan.block_size}"):
        plans_of(checkpoint, drafting={"block_size": 99})
    with pytest.raises(DraftsmithError, match=r"line version 3: its folder .*gone is missing"):
        plans_of(checkpoint / "gone")


def test_an_adapter_without_a_drafter_that_it_adapts_is_an_error(tiny_drafter: DrafterArtifacts) -> None:
    folder = tiny_drafter.drafter / DRAFTER_FOLDER

    def errors(start: dict[str, str], **fields: Any) -> list[str]:
        nodes = [champion(folder), node_of("sft", {**LEARNED, **start}, lora={"rank": 4}, **fields)]
        findings = Findings()
        check_drafters(findings, nodes, tiny_drafter.target, whole=True)
        return [line.text for line in findings.lines if line.level is Level.ERROR]

    continued, upgrade = {"drafter": "champion"}, {"drafter": {"kind": "dspark"}}
    assert errors(continued) == errors({}, init_from=str(folder)) == []
    (new,) = errors({}, drafter={"mask_token": MASK})
    (upgraded,), (upgraded_champion,) = errors({}, init_from=str(folder), **upgrade), errors(continued, **upgrade)
    assert "random weights" in new and "becomes a dspark" in upgraded == upgraded_champion


@pytest.mark.parametrize(
    ("section", "ignored"),
    [
        ({}, []),
        ({"kind": "eagle3"}, ["kind eagle3 (the champion: dflash)"]),
        ({"kind": "dspark", "num_layers": 7}, ["num_layers 7 (the champion: {layers})"]),
        ({"kind": "dspark"}, []),
    ],
)
def test_fields_that_the_champion_overrides_are_a_warning(
    section: dict[str, Any], ignored: list[str], tiny_drafter: DrafterArtifacts
) -> None:
    folder = tiny_drafter.drafter / DRAFTER_FOLDER
    nodes, findings = [champion(folder), node_of("sft", CONTINUED, **in_section(section))], Findings()
    (plan,) = check_drafters(findings, nodes, tiny_drafter.target, whole=True).values()
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    warnings = [line.text for line in findings.lines if line.level is Level.WARNING]
    found = [text.split("sft.drafter: ")[1].split(": not used")[0] for text in warnings]
    assert found == [text.format(layers=layers) for text in ignored]
    assert plan.kind == ("dspark" if section.get("kind") == "dspark" else "dflash")
