"""The whole refresh in one file, `configs/whole_refresh.py`, on the tiny target."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType
from typing import Any

import pytest

from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import PROMPTS
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from tests.flows.processes import ROOT
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.target import MASK, target_folder

SIZES: dict[str, Any] = {"sequences_per_step": 4, "anchors_per_sequence": 8}
SFT_STEPS, OPD_STEPS, TRAINED_ON, HELD_OUT = 200, 40, 160, 40


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the file as a module, with the sizes of the tiny target instead of its own."""
    spec = importlib.util.spec_from_file_location("whole_refresh", ROOT / "configs" / "whole_refresh.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = DFlashConfig(num_layers=1, block_size=6, target_layer_ids=(0, 1, 2), mask_token=MASK)
    monkeypatch.setattr(module, "SHAPE", shape)
    monkeypatch.setattr(
        module, "SFT", module.SFT.model_copy(update={**SIZES, "steps": SFT_STEPS, "learning_rate": 5e-3})
    )
    monkeypatch.setattr(
        module, "OPD", module.OPD.model_copy(update={**SIZES, "steps": OPD_STEPS, "learning_rate": 2e-3})
    )
    monkeypatch.setattr(module, "NEW_TOKENS", 48)
    return module


def test_the_file_trains_and_compares_drafters(
    example: ModuleType, tiny_drafter: DrafterArtifacts, capsys: pytest.CaptureFixture[str]
) -> None:
    """An untrained drafter proposes almost nothing right, whatever its seed; trained ones accept whole phrases.

    The held-out prompts are those whose answers have no near-tie, so a drafter changes no token of them.
    """
    rows = read_table(tiny_drafter.prompts / "prompts.parquet", PROMPTS).to_pylist()
    train = [row["messages"] for row in rows if row["split"] == "train"][:TRAINED_ON]
    heldout = [row["messages"] for row in rows if row["split"] == "heldout"][:HELD_OUT]
    assert (len(train), len(heldout)) == (TRAINED_ON, HELD_OUT)
    comparison = example.refresh(str(target_folder()), [*train, *heldout], held_out=HELD_OUT)
    shown = capsys.readouterr().out

    assert f"{HELD_OUT} of {HELD_OUT} answers with the drafter equal the target's own" in shown
    losses = {name: [float(x) for x in re.findall(rf"{name} step \d+: loss (\S+)", shown)] for name in ("SFT", "OPD")}
    assert [len(each) for each in losses.values()] == [SFT_STEPS, OPD_STEPS]
    assert sum(losses["SFT"][-10:]) < 0.5 * sum(losses["SFT"][:10])  # in fact 0.1
    ((rejecting, visited),) = re.findall(r"something in (\d+) of (\d+) verify steps", shown)
    assert 0 < int(rejecting) < int(visited)

    tau = comparison.to_pandas()["tau"]
    assert tau["untrained"] < 1.3  # in fact 1.01
    assert all(tau[name] > 2 for name in ("SFT", "SFT + OPD", "SFT continued"))  # in fact above 4
