"""The graph of a refresh, from the quickstart's config."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store import Store
from draftsmith.flows.pipeline.graph import Status, external_digests, in_order, plan
from draftsmith.flows.pipeline.options import TimeLimit
from draftsmith.flows.refresh.config import RefreshConfig, control_config, load_config
from draftsmith.flows.refresh.graph import REFRESH, refresh_nodes
from tests.flows.pipeline.processes import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture
def config() -> RefreshConfig:
    return load_config(ROOT / "configs" / "quickstart.yaml")


def test_the_nodes_fit_their_stages_and_come_in_the_order_of_the_method(config: RefreshConfig) -> None:
    assert [node.name for node in in_order(refresh_nodes(config))] == [
        *("target", "prompts", "heldout", "rollout", "sft", "assisted", "mining", "opd", "control"),
        *("evaluation", "report"),
    ]


def test_without_the_control_nothing_asks_for_it(config: RefreshConfig) -> None:
    alone = load_config(ROOT / "configs" / "quickstart.yaml", ["refresh.control=false"])
    nodes = {node.name: node for node in in_order(refresh_nodes(alone))}
    assert "control" not in nodes
    assert "control" not in nodes["evaluation"].inputs
    assert {node.name for node in refresh_nodes(config)} - set(nodes) == {"control"}


def test_logged_answers_take_the_place_of_both_rollouts(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("{}\n")
    text = (ROOT / "configs" / "quickstart.yaml").read_text()
    path = tmp_path / "logs.yaml"
    logs = f"logs: {{paths: {log}, temperature: 0}}\n"
    without = {key: value for key, value in yaml.safe_load(text).items() if key not in ("rollout", "assisted")}
    for config_text in (text + logs, yaml.safe_dump(without) + logs):
        path.write_text(config_text)
        nodes = {node.name: node for node in in_order(refresh_nodes(load_config(path)))}
        assert not {"rollout", "assisted"} & set(nodes)
        assert {name for name, node in nodes.items() if "logs" in node.inputs.values()} == {
            *("sft", "mining", "opd", "control"),
        }
        assert nodes["evaluation"].inputs["trajectories"] == "heldout"
    path.write_text(text + logs)
    more = {n.name: n for n in refresh_nodes(load_config(path, ["refresh.iterations=2", "seed=5"]))}
    seeds = [more[name].seed for name in ("sft", "opd-1", "control-1", "opd", "control")]
    assert seeds == [None, 1005, 1005, 2005, 2005], "of the same answers, every training draws batches of its own"
    key = external_digests(nodes["logs"].config)
    log.write_text("{}\n{}\n")
    assert external_digests(nodes["logs"].config) != key
    path.write_text(yaml.safe_dump(without))
    with pytest.raises(DraftsmithError, match="rollout is required: give this section, or logs"):
        load_config(path)


def test_the_control_trains_as_long_as_opd_and_is_sft_in_all_else(config: RefreshConfig) -> None:
    control = control_config(config)
    assert control.steps == config.opd.steps != config.sft.steps
    assert control.sequences_per_step == config.opd.sequences_per_step
    assert control.anchors_per_sequence == config.opd.anchors_per_sequence
    assert control.learning_rate == config.opd.learning_rate != config.sft.learning_rate
    assert control.warmup_fraction == config.opd.warmup_fraction
    assert (control.gamma, control.drafter) == (config.sft.gamma, config.sft.drafter)


def test_every_stage_has_a_digest_of_its_code(config: RefreshConfig, tmp_path: Path) -> None:
    first, *others = plan(config, Store(tmp_path), REFRESH)
    assert first.status is Status.RUN
    assert {item.status for item in others} == {Status.AFTER}
    assert len({REFRESH.code_digest(node.module) for node in refresh_nodes(config)}) == 8


def test_a_split_that_is_measured_must_be_answered() -> None:
    """Splits follow each other as held out, validation, train: 40, 8 and 256 prompts."""
    both = "heldout.splits=[validation, heldout]"
    for override in ("heldout.prompts=1", "heldout.skip=39"):
        load_config(QUICKSTART, [both, override])
    with pytest.raises(DraftsmithError, match="heldout: skip and prompts leave out all of split heldout"):
        load_config(QUICKSTART, [both, "heldout.skip=40"])


def test_a_time_limit_for_an_unknown_node_is_refused() -> None:
    with pytest.raises(
        DraftsmithError, match=r"stages\.time_limits\.stf: no such node, use one of: assisted, control,"
    ):
        load_config(ROOT / "configs" / "quickstart.yaml", ["stages.time_limits.stf=5"])
    limits = load_config(ROOT / "configs" / "quickstart.yaml", ["stages.time_limits.control=5"]).stages
    assert limits.time_limit("control") == TimeLimit(300, "stages.time_limits.control")
    assert limits.time_limit("sft") == TimeLimit(limits.time_limit_minutes * 60, "stages.time_limit_minutes")


def test_iterations_start_from_the_drafter_before_and_take_the_next_prompts() -> None:
    overrides = ["refresh.iterations=3", "assisted.prompts=20"]
    nodes = {node.name: node for node in in_order(refresh_nodes(load_config(QUICKSTART, overrides)))}
    chain = [("sft", "sft", "-1"), ("opd-1", "control-1", "-2"), ("opd-2", "control-2", "")]
    for iteration, (drafter, control, suffix) in enumerate(chain):
        assisted = nodes[f"assisted{suffix}"]
        assert assisted.config.model_dump()["skip"] == 192 + 20 * iteration
        assert assisted.inputs["drafter"] == drafter
        for name in ("mining", "opd"):
            assert nodes[f"{name}{suffix}"].inputs["drafter"] == drafter
            assert nodes[f"{name}{suffix}"].inputs["trajectories"] == f"assisted{suffix}"
        assert nodes[f"control{suffix}"].inputs["drafter"] == control
        inputs = nodes[f"evaluation{suffix}"].inputs
        assert (inputs["sft"], inputs["opd"], inputs["control"]) == ("sft", f"opd{suffix}", f"control{suffix}")
    assert nodes["report"].inputs["evaluation"] == "evaluation"


def test_more_iterations_reuse_those_that_were_made() -> None:
    once = {node.name: node for node in refresh_nodes(load_config(QUICKSTART, ["assisted.prompts=20"]))}
    twice = {
        node.name: node
        for node in refresh_nodes(load_config(QUICKSTART, ["assisted.prompts=20", "refresh.iterations=2"]))
    }
    for name in ("assisted", "mining", "opd", "control", "evaluation"):
        assert twice[f"{name}-1"].config == once[name].config
    of_all_iterations = load_config(QUICKSTART, ["stages.time_limits={opd: 5}"]).stages
    assert of_all_iterations.time_limit("opd-1") == TimeLimit(300, "stages.time_limits.opd")


def test_iterations_without_enough_prompts_are_refused() -> None:
    with pytest.raises(DraftsmithError, match="5 iterations need 512 prompts and section prompts has 256"):
        load_config(QUICKSTART, ["refresh.iterations=5"])
    with pytest.raises(DraftsmithError, match=r"assisted\.prompts: say how many"):
        load_config(QUICKSTART, ["refresh.iterations=2", "assisted.prompts=null"])
