"""The graph of a refresh, from the quickstart's config."""

from __future__ import annotations

from pathlib import Path

import pytest

from artifacts.errors import DraftsmithError
from artifacts.store import Store
from flows.config import RunConfig, control_config, load_config
from flows.graph import Status, in_order, plan
from flows.refresh_graph import REFRESH, refresh_nodes
from tests.flows.processes import ROOT


@pytest.fixture
def config() -> RunConfig:
    return load_config(ROOT / "configs" / "quickstart.yaml")


def test_every_config_of_the_repository_is_valid() -> None:
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        in_order(refresh_nodes(load_config(path)))


def test_the_nodes_fit_their_stages_and_come_in_the_order_of_the_method(config: RunConfig) -> None:
    assert [node.name for node in in_order(refresh_nodes(config))] == [
        *("target", "prompts", "rollout", "sft", "assisted", "mining", "opd", "heldout", "control"),
        *("evaluation", "report"),
    ]


def test_without_the_control_nothing_asks_for_it(config: RunConfig) -> None:
    alone = load_config(ROOT / "configs" / "quickstart.yaml", ["refresh.control=false"])
    nodes = {node.name: node for node in in_order(refresh_nodes(alone))}
    assert "control" not in nodes
    assert "control" not in nodes["evaluation"].inputs
    assert {node.name for node in refresh_nodes(config)} - set(nodes) == {"control"}


def test_the_control_trains_as_long_as_opd_and_is_sft_in_all_else(config: RunConfig) -> None:
    control = control_config(config)
    assert control.steps == config.opd.steps != config.sft.steps
    assert control.sequences_per_step == config.opd.sequences_per_step
    assert control.anchors_per_sequence == config.opd.anchors_per_sequence
    assert control.learning_rate == config.opd.learning_rate != config.sft.learning_rate
    assert control.warmup_fraction == config.opd.warmup_fraction
    assert (control.gamma, control.drafter) == (config.sft.gamma, config.sft.drafter)


def test_every_stage_has_a_digest_of_its_code(config: RunConfig, tmp_path: Path) -> None:
    first, *others = plan(config, Store(tmp_path), REFRESH)
    assert first.status is Status.RUN
    assert {item.status for item in others} == {Status.AFTER}
    assert len({REFRESH.code_digest(node.module) for node in refresh_nodes(config)}) == 8


def test_a_time_limit_for_an_unknown_node_is_refused() -> None:
    with pytest.raises(
        DraftsmithError, match=r"stages\.time_limits\.stf: no such node, use one of: assisted, control,"
    ):
        load_config(ROOT / "configs" / "quickstart.yaml", ["stages.time_limits.stf=5"])
    limits = load_config(ROOT / "configs" / "quickstart.yaml", ["stages.time_limits.control=5"]).stages
    assert (limits.time_limit_s("control"), limits.time_limit_s("sft")) == (300, limits.time_limit_minutes * 60)
