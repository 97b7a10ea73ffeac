"""Checks during a run: the first error stops it before any long stage."""

from __future__ import annotations

import json
import shutil
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
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.data.prompts import PromptsConfig
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_prompts
from draftsmith.stages.drafters.stage import ChampionConfig
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.replay.stage import MiningConfig
from draftsmith.stages.target.info import read_target_info
from draftsmith.stages.training.config import SftConfig
from tests.flows.toy import ToyConfig, toy_nodes
from tests.flows.toy_stages.combine import CombineConfig
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.target import MASK


def check_target(nodes: list[Node], target: Path) -> None:
    """Make the checks that a run makes once it has the target."""
    check_drafters(RaisingFindings(), nodes, target, whole=True)
    check_stage_settings(RaisingFindings(), nodes, target, whole=True)


def test_every_stage_checks_its_config_against_the_target(tmp_path: Path) -> None:
    check_target(toy_nodes(ToyConfig(name="t")), tmp_path)
    bad = ToyConfig(name="t", total=CombineConfig(factor=0))
    with pytest.raises(DraftsmithError, match="total: factor: 0 makes every sum 0"):
        check_target(toy_nodes(bad), tmp_path)


def test_sft_that_continues_a_drafter_is_not_checked_as_a_new_one(tiny_drafter: DrafterArtifacts) -> None:
    """The control of a refresh has section sft, but does not train the drafter that the section describes."""
    config = SftConfig.model_validate({"drafter": {"mask_token": "<never>"}})
    learned = {"target": "target", "trajectories": "rollout"}
    control = Node("control", "draftsmith.stages.training.sft.stage", config, {**learned, "drafter": "sft"})
    check_target([control], tiny_drafter.target)
    with pytest.raises(DraftsmithError, match=r"sft: drafter: .*'<never>' is not a token of the target"):
        check_target([Node("sft", "draftsmith.stages.training.sft.stage", config, learned)], tiny_drafter.target)


@pytest.mark.parametrize(
    ("fields", "errors"), [({"skip": 8}, 1), ({"skip": 3, "prompts": 6}, 1), ({"skip": 3, "prompts": 5}, 0), ({}, 0)]
)
def test_a_rollout_with_too_few_prompts_is_an_error(fields: dict[str, int], errors: int) -> None:
    prompts = PromptsConfig.model_validate(
        {"sources": [{"kind": "jsonl", "path": "p.jsonl"}], "train": 8, "validation": 0, "heldout": 2}
    )
    asked = {"target": "target", "prompts": "prompts"}
    nodes = [
        Node("prompts", "draftsmith.stages.data.prompts", prompts, {"target": "target"}),
        Node("answers", "draftsmith.stages.engines.stage", RolloutConfig.model_validate(fields), asked),
    ]
    findings = Findings()
    check_prompt_counts(findings, nodes)
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
    start = {"init_from": str(tiny_drafter.drafter / "drafter")} | ({"drafter": section} if section else {})
    sft = Node(
        "sft",
        "draftsmith.stages.training.sft.stage",
        SftConfig.model_validate(start),
        {"target": "t", "trajectories": "r"},
    )
    findings = Findings()
    plans = check_drafters(findings, [sft], tiny_drafter.target, whole=True)
    assert plans["sft"].kind == kind
    assert any("section drafter is not used" in line.text for line in findings.lines) == noted


def test_every_node_is_checked_against_the_drafter_that_it_reads(tiny_drafter: DrafterArtifacts) -> None:
    """Only one of two drafters was trained with blocks that large."""
    shape = {"block_size": 4, "mask_token": MASK, "num_layers": 1, "target_layer_ids": [0, 2]}
    learned = {"target": "t", "trajectories": "r"}

    def nodes(name: str, block_size: int) -> list[Node]:
        eagle = {"kind": "eagle3", "block_size": 8, "target_layer_ids": [0, 1, 2]}
        mining = MiningConfig.model_validate({"drafting": {"block_size": block_size}})
        return [
            Node(
                "small", "draftsmith.stages.training.sft.stage", SftConfig.model_validate({"drafter": shape}), learned
            ),
            Node(
                "large", "draftsmith.stages.training.sft.stage", SftConfig.model_validate({"drafter": eagle}), learned
            ),
            Node("more", "draftsmith.stages.training.sft.stage", SftConfig(), {**learned, "drafter": name}),
            Node("mining", "draftsmith.stages.replay.stage", mining, {**learned, "drafter": "more"}),
        ]

    check_target(nodes("large", 8), tiny_drafter.target)
    with pytest.raises(DraftsmithError, match=r"mining: .* 8 is larger than the trained 4"):
        check_target(nodes("small", 8), tiny_drafter.target)


def test_sampling_with_a_drafter_on_cpu_servers_is_an_error() -> None:
    engine = {"kind": "sglang", "python": "python", "launch": {"options": {"device": "cpu"}}}
    config = EvaluationConfig.model_validate({"engine": engine, "temperatures": [0, 1]})
    with pytest.raises(DraftsmithError, match=r"speed: temperatures: SGLang verifies greedily on this device"):
        check_engines(RaisingFindings(), [Node("speed", "draftsmith.stages.evaluation.stage", config, {"sft": "sft"})])
    rollout = RolloutConfig.model_validate({"engine": engine, "sampling": {"temperature": 1}})
    with pytest.raises(DraftsmithError, match=r"assisted: sampling\.temperature"):
        check_engines(
            RaisingFindings(), [Node("assisted", "draftsmith.stages.engines.stage", rollout, {"drafter": "sft"})]
        )
    with pytest.raises(DraftsmithError, match=r"sglang \(rollout\): engine\.python"):  # without a drafter it may sample
        check_engines(RaisingFindings(), [Node("rollout", "draftsmith.stages.engines.stage", rollout, {})])


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
    engine = {"kind": "sglang", "launch": {"options": options}}
    nodes = [
        Node(
            "sft",
            "draftsmith.stages.training.sft.stage",
            SftConfig.model_validate({"drafter": shape}),
            {"target": "t", "trajectories": "r"},
        ),
        Node(
            "assisted",
            "draftsmith.stages.engines.stage",
            RolloutConfig.model_validate({"engine": engine}),
            {"target": "t", "prompts": "p", "drafter": "sft"},
        ),
    ]
    findings = Findings()
    assert "sft" in check_drafters(findings, nodes, tiny_drafter.target, whole=False)
    found = [line.text for line in findings.lines if (line.check, line.level) == ("assisted", Level.ERROR)]
    assert len(found) == errors and all("target.dtype: float32" in text for text in found)


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

    (warning,) = warnings()
    assert "pip install kernels" in warning
    (tmp_path / "kernels.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert warnings() == []


def test_prompts_that_are_too_long_for_a_stage_are_an_error(
    tiny_drafter: DrafterArtifacts,
) -> None:
    limit = read_target_info(tiny_drafter.target).max_positions
    longest = max(len(prompt.token_ids) for prompt in load_prompts(tiny_drafter.prompts, ["heldout"]))
    for module, made in (("rollout", RolloutConfig), ("evaluation", EvaluationConfig)):
        for over in (0, 1):
            fields: dict[str, Any] = {"sampling": {"max_new_tokens": limit - longest + over}}
            fields |= {"splits": ["heldout"]} if made is RolloutConfig else {"validation_prompts": 1}
            node = Node("late", STAGES[module], made.model_validate(fields), {"prompts": "prompts"})
            findings = Findings()
            for name in ("prompts", "other_prompts"):
                check_lengths(findings, [node], name, tiny_drafter.prompts, limit)
            assert [line.check for line in findings.lines] == ["late"] * over


def test_settings_are_checked_against_the_champions_drafter(tiny_drafter: DrafterArtifacts) -> None:
    def plans_of(folder: Path, **drafting: int) -> DrafterPlans:
        serves = ChampionConfig(line="line", version=3, folder=str(folder), content_id="c", drafter_digest="d")
        learned = {"target": "target", "trajectories": "rollout", "drafter": "champion"}
        assisted = RolloutConfig.model_validate({"drafting": drafting} if drafting else {})
        nodes = [
            Node("champion", "draftsmith.stages.drafters.stage", serves, {"target": "target"}),
            Node("sft", "draftsmith.stages.training.sft.stage", SftConfig(), learned),
            Node("assisted", "draftsmith.stages.engines.stage", assisted, {"target": "target", "drafter": "sft"}),
        ]
        return check_drafters(RaisingFindings(), nodes, tiny_drafter.target, whole=True)

    checkpoint = tiny_drafter.drafter / DRAFTER_FOLDER
    (plan,) = plans_of(checkpoint).values()
    assert plan.parameters > 0 and plan.kind == "dflash"
    with pytest.raises(DraftsmithError, match=f"assisted: drafting.block_size: 99 is larger .* {plan.block_size}"):
        plans_of(checkpoint, block_size=99)
    with pytest.raises(DraftsmithError, match=r"line version 3: its folder .*gone is missing"):
        plans_of(checkpoint / "gone")


def test_an_adapter_without_a_drafter_that_it_adapts_is_an_error(tiny_drafter: DrafterArtifacts) -> None:
    folder = tiny_drafter.drafter / DRAFTER_FOLDER
    serves = ChampionConfig(line="line", version=3, folder=str(folder), content_id="c", drafter_digest="d")

    def errors(start: dict[str, str], **fields: Any) -> list[str]:
        sft = SftConfig.model_validate({"lora": {"rank": 4}, **fields})
        nodes = [
            Node("champion", STAGES["champion"], serves, {"target": "target"}),
            Node("sft", STAGES["sft"], sft, {"target": "target", "trajectories": "rollout", **start}),
        ]
        findings = Findings()
        check_drafters(findings, nodes, tiny_drafter.target, whole=True)
        return [line.text for line in findings.lines if line.level is Level.ERROR]

    continued, upgrade = {"drafter": "champion"}, {"drafter": {"kind": "dspark"}}
    assert errors(continued) == errors({}, init_from=str(folder)) == []
    (new,) = errors({}, drafter={"mask_token": MASK})
    (upgraded,), (champion,) = errors({}, init_from=str(folder), **upgrade), errors(continued, **upgrade)
    assert "random weights" in new and "becomes a dspark" in upgraded == champion


@pytest.mark.parametrize(
    ("section", "ignored"),
    [
        ({}, None),
        ({"kind": "eagle3"}, "kind eagle3 (the champion: dflash)"),
        ({"kind": "dspark", "num_layers": 7}, "num_layers 7 (the champion: {layers})"),
        ({"kind": "dspark"}, None),
    ],
)
def test_fields_that_the_champion_overrides_are_a_warning(
    section: dict[str, Any], ignored: str | None, tiny_drafter: DrafterArtifacts
) -> None:
    folder = tiny_drafter.drafter / DRAFTER_FOLDER
    serves = ChampionConfig(line="line", version=3, folder=str(folder), content_id="c", drafter_digest="d")
    sft = SftConfig.model_validate({"drafter": section} if section else {})
    nodes = [
        Node("champion", "draftsmith.stages.drafters.stage", serves, {"target": "target"}),
        Node("sft", "draftsmith.stages.training.sft.stage", sft, {"target": "target", "drafter": "champion"}),
    ]
    findings = Findings()
    (plan,) = check_drafters(findings, nodes, tiny_drafter.target, whole=True).values()
    now = json.loads((folder / "config.json").read_text())
    warnings = [line.text for line in findings.lines if line.level is Level.WARNING]
    expected = ignored and ignored.format(block=now["block_size"], layers=now["num_hidden_layers"])
    assert [text.split("sft.drafter: ")[1].split(": not used")[0] for text in warnings] == (
        [expected] if expected else []
    )
    assert plan.kind == ("dspark" if section.get("kind") == "dspark" else "dflash")
