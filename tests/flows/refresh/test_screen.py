"""The screen at the end of a refresh: short, with one verdict and the next commands."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.flows.execution.display import Display, EndedRun
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.screen import LINES, WIDTH, screen, show_results
from draftsmith.flows.refresh.versions import registry
from draftsmith.stages.drafters.champion import ChampionConfig
from tests.flows.refresh.line_runs import config_of
from tests.stages.report.sample_report import DECISION, EVALUATION, HOSTILE, OF_A_LINE

pytestmark = pytest.mark.usefixtures("home")


def ending(config: RefreshConfig, **changes: Any) -> EndedRun:
    fields: dict[str, Any] = {"overrides": ["seed=2"], "mlflow": "mlflow ui --db x", "seconds": 400.0}
    return EndedRun(config, "configs/weekly.yaml", **(fields | changes))


def ended(folder: Path, evaluation: dict[str, Any], decision: dict[str, Any] | None, **made: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    folders = {"evaluation": folder, "report": folder, **made}
    if decision is not None:
        (folder / "decision.json").write_text(json.dumps(decision))
        folders["gate"] = folder
    return folders


def commands(lines: list[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip().startswith("draftsmith ")]


@pytest.mark.parametrize("outcome", ["promoted", "refused", "inconclusive"])
def test_every_outcome_fits_on_a_screen(
    outcome: str, line: str, drafters: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rules = [rule | {"passed": outcome == "promoted" or rule["passed"]} for rule in DECISION["rules"]]
    rules[1]["passed"] = outcome != "refused"
    registry().register(line, drafters[0], {})
    decision = DECISION | {"outcome": outcome, "promote": outcome == "promoted", "rules": rules}
    made = ended(tmp_path / "made", OF_A_LINE, decision, opd=drafters[0].path)
    lines = screen(made, ending(config_of(line)))
    assert len(lines) <= LINES
    assert max(map(len, [each for each in lines if "draftsmith" not in each])) <= WIDTH
    assert lines[2].startswith("PROMOTED: " if outcome == "promoted" else f"NOT PROMOTED: {outcome}. ")
    assert any("Nothing is broken" in each for each in lines) is (outcome == "inconclusive")
    assert sum("◂" in each for each in lines) == 2, "the challenger, and the legend of the mark"
    assert any(f"{line}@1" in each for each in lines), "the challenger's version"
    (gate,) = [each for each in lines if each.startswith("Gate ")]
    assert gate.count("✓") + gate.count("✗") + gate.count("?") == 4
    wanted = {"promoted": f"export {line}@champion", "refused": "report ", "inconclusive": "run configs/weekly.yaml"}
    assert wanted[outcome] in commands(lines)[0]
    assert lines[-2].startswith("Drafter  ") and lines[-1] == "MLflow   mlflow ui --db x"


def test_the_screen_says_if_another_arm_measured_better_than_the_challenger(
    line: str, drafters: list[Artifact], tmp_path: Path
) -> None:
    registry().register(line, drafters[0], {})
    chosen = OF_A_LINE | {"validation_tau": {"sft": 3.9, "opd": 3.5}, "chosen_on": 4}
    decision = DECISION | {"outcome": "promoted", "promote": True, "challenger": "sft"}
    lines = screen(ended(tmp_path / "sft", chosen, decision, sft=drafters[0].path), ending(config_of(line)))
    text, tau = " ".join(lines), OF_A_LINE["drafters"]["opd"]["tau"]
    assert "SFT is the challenger: it has the highest acceptance length on 4 validation prompts (" in text
    assert f"On the held-out prompts SFT + OPD measured better ({tau:.2f} against" in text and len(lines) <= LINES
    best = ended(tmp_path / "opd", OF_A_LINE, DECISION, opd=drafters[0].path)
    assert "is the challenger" not in " ".join(screen(best, ending(config_of(line))))


def test_a_current_champion_is_the_verdict(line: str, tmp_path: Path) -> None:
    (tmp_path / "drift.json").write_text(json.dumps({"all": {"tau": 2.5, "low": 2.4, "high": 2.6, "prompts": 40}}))
    config = config_of(line)
    assert config.registry is not None
    figures = {"all": {"tau": 2.55}}
    champion = ChampionConfig(
        line=line, version=3, folder=str(tmp_path), content_id="a", drafter_digest="b", figures=figures
    )
    config = config.model_copy(update={"registry": config.registry.model_copy(update={"champion": champion})})
    lines = screen({"drift": tmp_path}, ending(config))
    assert lines[2].startswith(f"CURRENT: {line}@3 ")
    (command,) = commands(lines)
    assert command.startswith("draftsmith run configs/weekly.yaml --set seed=2 --force drift")
    lines = screen({"drift": tmp_path}, ending(config, outcome="Unserved", refused="a server is down"))
    assert "NOT SERVED: a server is down" in lines


def test_a_promotion_that_is_not_served_is_a_promotion(line: str, drafters: list[Artifact], tmp_path: Path) -> None:
    registry().register(line, drafters[0], {})
    made = ended(
        tmp_path / "made", OF_A_LINE, DECISION | {"outcome": "promoted", "promote": True}, opd=drafters[0].path
    )
    for outcome, head in (("Waiting", "NOT PROMOTED: why"), ("Unserved", "PROMOTED, NOT SERVED: why")):
        assert screen(made, ending(config_of(line), outcome=outcome, refused="why"))[2] == head


def test_a_long_reason_does_not_fill_the_screen(line: str, drafters: list[Artifact], tmp_path: Path) -> None:
    registry().register(line, drafters[0], {})
    long = "a server is down. " * 200
    changes = {"outcome": "unserved", "refused": long, "overrides": ["name=" + "a" * WIDTH]}  # commands of two lines
    for outcome in ("promoted", "refused", "inconclusive"):
        failed = {"passed": False, "conclusive": outcome == "refused", "name": f"tau of {long[:200]}", "text": long}
        rules = [rule | ({} if outcome == "promoted" else failed) for rule in DECISION["rules"]]
        decision = DECISION | {"outcome": outcome, "promote": outcome == "promoted", "rules": rules}
        made = ended(tmp_path / outcome, OF_A_LINE, decision, opd=drafters[0].path)
        lines = screen(made, ending(config_of(line), **changes))
        assert len(lines) <= LINES and lines[-1].startswith("MLflow ")


def test_hostile_names_are_escaped_and_cut(line: str, tmp_path: Path) -> None:
    name = f"[bold]{HOSTILE}" * 3
    drafters = {"sft": EVALUATION["drafters"]["sft"], name: EVALUATION["drafters"]["sft"]}
    stream = io.StringIO()
    made = ended(tmp_path, {"drafters": drafters, "speed": EVALUATION["speed"]}, None)
    show_results(Display(Console(file=stream, width=WIDTH)), made, ending(config_of(line)))
    assert "\x1b" not in stream.getvalue() and "\u202e" not in stream.getvalue()
    assert any(each.startswith("…") for each in stream.getvalue().splitlines())
