"""Making one node's artifact, where others work on the same store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import DraftsmithError
from artifacts.store import Claim, Store
from artifacts.tracking import Tracking
from flows.display import Display
from flows.graph import key_of
from flows.node_run import Workshop, make
from flows.stage_process import StageOutcome, run_stage
from tests.flows.toy import TOY, ToyConfig, toy_nodes


@pytest.mark.parametrize("when", ["before", "while the stage runs"])
def test_an_input_that_another_run_makes_again_is_not_filed_under_the_old_key(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ToyConfig(name="t")
    nodes = {node.name: node for node in toy_nodes(config)}
    workshop = Workshop(tmp_path, config, TOY, Display(), Tracking(tmp_path))
    target = make(workshop, nodes["target"], {}).ref

    def make_it_again() -> None:
        with Store(tmp_path / "store").claim(target.stage, target.key, force=True) as claim:
            assert isinstance(claim, Claim)
            (claim.out / "numbers.json").write_text(json.dumps([1000]))
            workshop.store.commit(claim, config={}, inputs={}, code_digest="c", seed=0)

    def run_and_be_overtaken(*arguments: Any, **keywords: Any) -> StageOutcome:
        outcome = run_stage(*arguments, **keywords)
        make_it_again()
        return outcome

    if when == "before":
        make_it_again()
    else:
        monkeypatch.setattr("flows.node_run.run_stage", run_and_be_overtaken)
    with pytest.raises(DraftsmithError, match=r"left: its input first .* was made again by another run"):
        make(workshop, nodes["left"], {"first": target})
    assert workshop.store.find("combine", key_of(nodes["left"], {"first": target}, config.seed, TOY)) is None
