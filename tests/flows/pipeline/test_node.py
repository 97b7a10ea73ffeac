"""Making one node's artifact, where others work on the same store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store import Claim, Store
from draftsmith.artifacts.tracking import Tracking
from draftsmith.flows.pipeline.display import Display
from draftsmith.flows.pipeline.graph import key_of
from draftsmith.flows.pipeline.node import Workshop, make
from draftsmith.flows.pipeline.process import StageOutcome, run_stage
from tests.flows.pipeline.toy import TOY, ToyConfig, toy_nodes


@pytest.mark.parametrize("when", ["before", "while the stage runs"])
def test_an_input_that_another_run_makes_again_is_not_filed_under_the_old_key(
    when: str, tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ToyConfig(name="t")
    nodes = {node.name: node for node in toy_nodes(config)}
    workshop = Workshop(tmp_path, config, TOY, Display(), tracking)
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
        monkeypatch.setattr("draftsmith.flows.pipeline.node.run_stage", run_and_be_overtaken)
    with pytest.raises(DraftsmithError, match=r"left: its input first .* was made again by another run"):
        make(workshop, nodes["left"], {"first": target})
    assert workshop.store.find("combine", key_of(nodes["left"], {"first": target}, config.seed, TOY)) is None
