"""`--from` and `--until`: which nodes a run makes, and that nothing before them is made by surprise."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.local import Store
from draftsmith.flows.planning.selection import Part
from tests.flows.planning.test_graph import fill, statuses
from tests.flows.toy import TOY, ToyConfig
from tests.flows.toy_stages.combine import CombineConfig


def test_until_makes_a_node_and_what_it_needs(tmp_path: Path) -> None:
    config, store = ToyConfig(name="t"), Store(tmp_path)
    assert list(statuses(Part(until=("left",)).plan(config, store, TOY))) == ["target", "left"]
    assert len(Part(until=("combine",)).plan(config, store, TOY)) == 4  # a stage: all its nodes
    with pytest.raises(DraftsmithError, match="--until lfet"):
        Part(until=("lfet",)).plan(config, store, TOY)


def test_from_takes_all_before_it_from_the_store(tmp_path: Path) -> None:
    config, store = ToyConfig(name="t"), Store(tmp_path)
    fill(store, config)
    changed = config.model_copy(update={"left": CombineConfig(factor=5)})
    made = {"target": "reused", "left": "run", "right": "reused", "total": "after"}
    assert statuses(Part(start=("left",)).plan(changed, store, TOY)) == made

    both = changed.model_copy(update={"right": CombineConfig(factor=6)})
    with pytest.raises(DraftsmithError, match=r"--from left: .*: right: "):
        Part(start=("left",)).plan(both, store, TOY)
    with pytest.raises(DraftsmithError, match=r"--from total: .*: left: "):
        Part(start=("total",)).plan(changed, store, TOY)
    assert statuses(Part(start=("left", "right")).plan(both, store, TOY))["right"] == "run"
    assert statuses(Part(start=("left",)).plan(both, store, TOY, ["right"]))["right"] == "forced"


def test_until_leaves_out_what_from_would_miss(tmp_path: Path) -> None:
    config, store = ToyConfig(name="t"), Store(tmp_path)
    fill(store, config)
    both = config.model_copy(update={"left": CombineConfig(factor=5), "right": CombineConfig(factor=6)})
    assert statuses(Part(("left",), ("left",)).plan(both, store, TOY)) == {"target": "reused", "left": "run"}
