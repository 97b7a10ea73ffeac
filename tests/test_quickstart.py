"""The demo succeeds whatever the gate decides, unless a drafter changes the outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.artifacts.results.gate import GateDecision, RuleResult
from draftsmith.artifacts.store.local import Store
from tests import quickstart
from tests.testbed.artifacts import committed


def decided(home: Path, lossless: bool) -> None:
    """Leave the decision of a gate in the store of a home."""
    rules = [
        RuleResult(name=name, passed=passed, text="") for name, passed in (("lossless", lossless), ("speed-up", False))
    ]
    decision = GateDecision(promote=False, outcome="refused", challenger="opd", rules=rules)
    store = Store(home / "store")
    committed(store, "gate", {GateDecision.FILE: decision.model_dump_json()})


@pytest.mark.parametrize(
    ("code", "lossless", "ends"), [(0, True, 0), (3, True, 0), (3, False, 3), (2, True, 2), (75, True, 75)]
)
def test_a_refusal_succeeds_unless_outputs_differ(
    code: int, lossless: bool, ends: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path))
    monkeypatch.setattr(quickstart, "draftsmith", lambda _: code)
    decided(tmp_path, lossless)
    assert quickstart.main() == ends
