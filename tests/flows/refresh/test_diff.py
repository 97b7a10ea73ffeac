"""Two versions of a line side by side, from what their refreshes stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import draftsmith
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.tracking.refresh_runs import RefreshRun
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.cli.main import main
from tests.flows.refresh.line_runs import config_of, finished, gated
from tests.testbed.artifacts import committed

pytestmark = pytest.mark.integration


def reported(store: Store, line: str, number: int, since: str, newest: str, steps: int) -> str | None:
    """Record the refresh of a version: its report, its logs and its run in MLflow, whose id is returned."""
    config: dict[str, object] = {"sft": {"steps": steps, "drafter": None}, "report": {"history": number}}
    config |= {"control": {"steps": steps}} if number > 1 else {}
    figures = {"tau_gain": 0.02, "tau_gain/chat": 0.1, "tau_gain/chat.low": 0.05, "tau_gain/chat.high": 0.15}
    if number > 1:
        config |= {"champion": {"line": line, "version": number - 1}}
    review = {"outcome": {"kind": "promoted", "sentence": "it is"}, "metrics": figures, "config": config}
    made = {
        "report": {"report.html": "<p>", "review.json": json.dumps(review)},
        "logs": {"logs.json": json.dumps({"window": {"since": since, "newest": newest}})},
    }
    refs = {
        node: committed(store, node, files, store.key(node, "c", {"n": number}, {}, 0)) for node, files in made.items()
    }
    record = RefreshRun(Tracking(store.root.parent, line), "weekly", {})
    run_id = record.open()
    record.close("FINISHED", refs, {}, [], {})
    return run_id


def test_two_versions_are_compared(
    line: str, home: Path, drafters: list[Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    store, config = Store(home / "store"), config_of(line)
    runs = [
        reported(store, line, 1, "2026-11-16T03:00:00+00:00", "2026-11-23T02:00:00+00:00", 100),
        reported(store, line, 2, "2026-11-23T03:00:00+00:00", "2026-11-30T02:00:00+00:00", 200),
    ]
    for drafter, tau, run_id in zip(drafters, (2.5, 2.75), runs, strict=False):
        finished(config, gated(store, drafter, tau=tau), run_id)
    table = draftsmith.diff(f"{line}@1", line)
    assert list(table.columns) == [f"{line}@1", f"{line}@2", "gain"]
    rows = {name: list(row) for name, row in zip(table.index, table.to_numpy(), strict=True)}
    assert rows["data"] == ["week of 16 Nov", "week of 23 Nov", ""]
    assert rows["tau"] == ["2.50 [2.40, 2.60]", "2.75 [2.65, 2.85]", ""], "no interval of the gain on all prompts"
    assert rows["tau, chat"][2] == "+10.0% [+5.0%, +15.0%]"
    assert rows["speed-up"][:2] == ["1.20 [1.15, 1.25]"] * 2 and rows["sft.steps"] == ["100", "200", ""]
    assert rows["control"] == ["—", "made", ""] and "control.steps" not in rows
    assert rows["gate"][:2] == ["promoted"] * 2 and not {"sft.drafter", "report.history"} & rows.keys()
    assert list(draftsmith.diff(f"{line}@2", f"{line}@1").columns) == [f"{line}@2", f"{line}@1"], "no gain backwards"

    assert main(["diff", f"{line}@1", f"{line}@2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "data week of 16 Nov week of 23 Nov" in text and "sft.steps 100 200" in text
    with pytest.raises(DraftsmithError, match="has no version 9"):
        draftsmith.diff(f"{line}@1", f"{line}@9")
    shutil.rmtree(store.root / "report")
    by_tags = draftsmith.diff(f"{line}@1", f"{line}@2")
    assert list(by_tags.columns) == [f"{line}@1", f"{line}@2"] and "sft.steps" not in by_tags.index
