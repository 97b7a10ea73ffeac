"""The graph and its plan: order, keys, what a change rebuilds, `--force`, `--from` and `--until`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.attempt import Attempt
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.flows.config.options import StageOptions
from draftsmith.flows.planning.graph import Node, Selection, topological_order
from draftsmith.flows.planning.plan import Build, Pipeline, Status, plan
from tests.flows.toy import COLLECT, COMBINE, TOY, EditedToy, ToyConfig, toy_nodes
from tests.flows.toy_stages.collect import CollectConfig
from tests.flows.toy_stages.combine import CombineConfig
from tests.testbed.artifacts import committed


def fill(store: Store, config: ToyConfig) -> None:
    """Commit an artifact of every node to the store, without running anything."""
    made: dict[str, Artifact] = {}
    for node in topological_order(toy_nodes(config)):
        inputs = {name: made[source] for name, source in node.inputs.items()}
        key = Build.of(TOY, config, node, inputs).key
        made[node.name] = committed(store, node.stage.name, {"numbers.json": node.name}, key, inputs=inputs)


def statuses(planned: list[Build]) -> dict[str, str]:
    return {item.node.name: item.status.value for item in planned}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([Node("a", COMBINE, CombineConfig(), {"first": "b"})], "comes from node b, which is not in the graph"),
        ([Node("a", COMBINE, CombineConfig())], "needs the input first"),
        ([Node("a", COLLECT, CollectConfig(), {"third": "a"})], "has no input third"),
        ([Node("a", COLLECT, CollectConfig()), Node("a", COLLECT, CollectConfig())], "same name"),
        (
            [Node("a", COMBINE, CombineConfig(), {"first": "b"}), Node("b", COMBINE, CombineConfig(), {"first": "a"})],
            "need each other: a, b",
        ),
    ],
)
def test_a_graph_that_does_not_fit_its_stages_is_refused(nodes: list[Node], message: str) -> None:
    with pytest.raises(DraftsmithError, match=message):
        topological_order(nodes)


@pytest.mark.parametrize(
    ("change", "pipeline", "expected"),
    [
        ({}, TOY, ("reused", "reused", "reused", "reused")),
        ({"name": "u", "stages": StageOptions(threads=2)}, TOY, ("reused", "reused", "reused", "reused")),
        ({"left": CombineConfig(factor=5)}, TOY, ("reused", "run", "reused", "after")),
        ({"seed": 1}, TOY, ("run", "after", "after", "after")),
        ({}, EditedToy(), ("run", "after", "after", "after")),
    ],
    ids=["nothing", "how to run", "a field", "the seed", "code"],
)
def test_a_change_is_one_of_its_node_and_of_its_dependants(
    change: dict[str, Any], pipeline: Pipeline, expected: tuple[str, ...], tmp_path: Path
) -> None:
    store, config = Store(tmp_path), ToyConfig(name="t")
    fill(store, config)
    planned = statuses(plan(config.model_copy(update=change), store, pipeline))
    assert planned == dict(zip(("target", "left", "right", "total"), expected, strict=True))


def test_an_unfinished_attempt_is_resumed(tmp_path: Path) -> None:
    store, config = Store(tmp_path), ToyConfig(name="t")
    target = plan(config, store, TOY)[0]
    assert target.key is not None
    with store.claim("collect", target.key) as claim:
        assert isinstance(claim, Attempt)
        assert plan(config, store, TOY)[0].status is Status.RUN  # nothing saved yet
        (claim.work / "saved.json").write_text("[]")
    assert plan(config, store, TOY)[0].status is Status.RESUME


def test_force_names_a_node_or_every_node_of_a_stage(tmp_path: Path) -> None:
    store, config = Store(tmp_path), ToyConfig(name="t")
    fill(store, config)
    assert statuses(plan(config, store, TOY, Selection(force=("left",)))) == {
        "target": "reused",
        "right": "reused",
        "left": "forced",
        "total": "after",
    }
    forced = plan(config, store, TOY, Selection(force=("combine",)))
    assert [item.node.name for item in forced if item.status is Status.FORCED] == ["left", "right"]
    with pytest.raises(DraftsmithError, match="--force lfet"):
        plan(config, store, TOY, Selection(force=("lfet",)))


def test_until_builds_a_node_and_what_it_needs(tmp_path: Path) -> None:
    config, store = ToyConfig(name="t"), Store(tmp_path)
    assert list(statuses(plan(config, store, TOY, Selection(until=("left",))))) == ["target", "left"]
    assert len(plan(config, store, TOY, Selection(until=("combine",)))) == 4  # all nodes of the stage
    with pytest.raises(DraftsmithError, match="--until lfet"):
        plan(config, store, TOY, Selection(until=("lfet",)))


def test_from_needs_everything_before_it_in_the_store(tmp_path: Path) -> None:
    config, store = ToyConfig(name="t"), Store(tmp_path)
    fill(store, config)
    changed = config.model_copy(update={"left": CombineConfig(factor=5)})
    made = {"target": "reused", "left": "run", "right": "reused", "total": "after"}
    assert statuses(plan(changed, store, TOY, Selection(start=("left",)))) == made

    both = changed.model_copy(update={"right": CombineConfig(factor=6)})
    with pytest.raises(DraftsmithError, match=r"--from left: right: "):
        plan(both, store, TOY, Selection(start=("left",)))
    with pytest.raises(DraftsmithError, match=r"--from total: left: "):
        plan(changed, store, TOY, Selection(start=("total",)))
    assert statuses(plan(both, store, TOY, Selection(start=("left", "right"))))["right"] == "run"
    assert statuses(plan(both, store, TOY, Selection(("right",), start=("left",))))["right"] == "forced"


def test_until_excludes_nodes_that_from_would_miss(tmp_path: Path) -> None:
    config, store = ToyConfig(name="t"), Store(tmp_path)
    fill(store, config)
    both = config.model_copy(update={"left": CombineConfig(factor=5), "right": CombineConfig(factor=6)})
    assert statuses(plan(both, store, TOY, Selection(start=("left",), until=("left",)))) == {
        "target": "reused",
        "left": "run",
    }
