"""The report stage: from complete artifacts of a store to the page."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.local import Store
from draftsmith.stages.report.stage import STAGE, ReportConfig
from draftsmith.stages.runtime.invocation import COMMAND
from tests.stages.report.sample_report import CONTEXTS, DECISION, EVALUATION, OF_A_LINE
from tests.testbed.artifacts import committed
from tests.testbed.context import RecordingContext


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    store = Store(tmp_path / "store")
    curve = "".join(json.dumps({"step": step, "loss": 3 - step / 10}) + "\n" for step in range(10))
    summary = json.dumps({"most_rejected": [{"token": " so", "rejected": 4}]})
    target = committed(store, "target", {"target.json": "{}"}, "a")
    sft = committed(store, "sft", {"model": "a", "metrics.jsonl": curve}, "b", inputs={"target": target})
    mining = committed(store, "mining", {"summary.json": summary}, "c", inputs={"drafter": sft})
    opd = committed(store, "opd", {"model": "b", "metrics.jsonl": curve}, "d", inputs={"drafter": sft, "mined": mining})
    control = committed(store, "sft", {"model": "c"}, "e", inputs={"drafter": sft})
    files, read = {"evaluation.json": json.dumps(EVALUATION)}, {"sft": sft, "opd": opd}
    evaluation = committed(store, "evaluation", files, "f", inputs=read)
    refs = {"mining": mining, "evaluation": evaluation, "sft": sft, "opd": opd, "control": control}
    return {name: ref.path for name, ref in refs.items()}


def run(tmp_path: Path, inputs: Mapping[str, Path], out: str = "out", **config: Any) -> RecordingContext:
    return RecordingContext(tmp_path / out, tmp_path / "work", inputs).run(STAGE, **config)


def written(folder: Path, name: str, content: Any) -> Path:
    """Return the folder, with a JSON file in it."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def test_the_page_shows_metrics_and_the_whole_lineage(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(COMMAND, raising=False)  # of a command that another test has run in this process
    ctx = run(tmp_path, inputs)
    page = (ctx.out / "report.html").read_text()
    for text in ("Draft model refresh", "3.543<br>", "draftsmith report CONFIG --open"):
        assert text in page
    for name in ("target", "sft", "mining", "opd", "control", "evaluation"):
        assert f'<th scope="row" class="text">{name}</th>' in page
    assert ctx.summaries == {"tau_sft": 3.412, "tau_opd": 3.543, "tau_control": 3.43}
    assert len(ctx.logs) == 1


def test_the_page_names_line_commit_and_user_and_repeats_the_command(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the page, but neither in the key nor in the content."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGNAME", "somebody")
    monkeypatch.setenv(COMMAND, json.dumps({"config": "a b.yaml", "overrides": ["seed=2"]}))
    gate = written(tmp_path / "gate", "decision.json", DECISION)
    config: dict[str, Any] = {"line": "weekly", "champion": ("weekly", 7)}
    page = (run(tmp_path, inputs | {"gate": gate}, **config).out / "report.html").read_text()
    for text in ("line weekly, against version 7", commit[:12], "somebody"):
        assert text in page, text
    assert "draftsmith run &#39;a b.yaml&#39; --set seed=2" in page
    assert "line" not in ReportConfig.model_validate(config).key_material()


def test_the_headline_does_not_depend_on_timing(tmp_path: Path, inputs: dict[str, Path]) -> None:
    of_tau = [verdict for verdict in EVALUATION["verdicts"] if verdict["kind"] == "tau"]
    slower = {**EVALUATION, "speed": {"plain": {"tokens_per_s": 1.0}}, "verdicts": of_tau}
    other = written(tmp_path / "slower", "evaluation.json", slower)
    first, second = run(tmp_path, inputs, "a"), run(tmp_path, inputs | {"evaluation": other}, "b")
    assert (first.out / "headline.json").read_bytes() == (second.out / "headline.json").read_bytes()
    headline = first.json("headline.json")
    assert headline["opd"]["tau"] == 3.543 and headline["opd"]["differences"].keys() == {"sft", "control"}
    assert "report.html" in STAGE.volatile
    assert "headline.json" not in STAGE.volatile


def test_a_missing_or_broken_evaluation_is_named(tmp_path: Path, inputs: dict[str, Path]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    with pytest.raises(DraftsmithError, match=r"evaluation\.json: missing"):
        run(tmp_path, inputs | {"evaluation": broken})
    (broken / "evaluation.json").write_text("{")
    with pytest.raises(DraftsmithError, match=r"evaluation\.json: content: Invalid JSON"):
        run(tmp_path, inputs | {"evaluation": broken})


def test_the_review_has_every_metric_the_verdict_and_the_configs(tmp_path: Path, inputs: dict[str, Path]) -> None:
    (inputs["evaluation"] / "contexts.json").write_text(json.dumps({"opd": CONTEXTS, "sft": []}))
    ctx = run(tmp_path, inputs | {"gate": written(tmp_path / "gate", "decision.json", DECISION)})
    review = ctx.json("review.json")
    assert review["outcome"]["kind"] == "inconclusive"
    assert review["outcome"]["label"] and review["outcome"]["sentence"]
    assert {each["arm"] for each in review["variants"]} == {"plain", "sft", "opd", "control"}
    assert [each["result"] for each in review["checks"]].count("inconclusive") == 1
    figures = review["metrics"]
    assert figures["tau.opd"] == figures["tau.challenger"] == EVALUATION["drafters"]["opd"]["tau"]
    assert figures["tau_minus.sft.challenger"] == 0.131
    assert set(review["config"]) >= {"target", "sft", "opd", "evaluation"}
    assert (ctx.out / "report.html").read_text().count('<article class="context">') == len(CONTEXTS)


def test_a_report_without_contexts_has_no_text_of_an_answer(tmp_path: Path, inputs: dict[str, Path]) -> None:
    texts = [f"{field} of a user" for field in ("before", "after", "accepted", "rejected", "dropped", "chosen")]
    step = {name.partition(" ")[0]: name for name in texts[2:]}
    context = {**CONTEXTS[0], "before": texts[0], "after": texts[1], "steps": [step], "slice": "language:de"}
    (inputs["evaluation"] / "contexts.json").write_text(json.dumps({"opd": [*CONTEXTS, context]}))
    for shown in (True, False):
        ctx = run(tmp_path, inputs, f"contexts-{shown}", contexts=shown)
        written = "".join(path.read_text() for path in ctx.out.iterdir())
        assert [text in written for text in texts] == [shown] * len(texts)


def test_the_champion_has_its_version_in_the_reports_line(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """Its artifact, and all that was measured against it, may be of another line that serves the same drafter."""
    store = Store(tmp_path / "store")
    champion = committed(store, "champion", {"champion.json": "{}"}, "1")
    files = {"evaluation.json": json.dumps(OF_A_LINE)}
    evaluation = committed(store, "evaluation", files, "2", inputs={"champion": champion})
    broken = {**DECISION["rules"][1], "passed": False}
    decision = DECISION | {"champion": "champion", "outcome": "refused", "rules": [broken]}
    gate = committed(store, "gate", {"decision.json": json.dumps(decision)}, "3", inputs={"champion": champion})
    measured = inputs | {"evaluation": evaluation.path, "gate": gate.path}
    ctx = run(tmp_path, measured, champion=("mine", 7))
    assert ctx.json("review.json")["config"]["champion"] == {"line": "mine", "version": 7}
    page = (ctx.out / "report.html").read_text()
    assert "mine@7" in page and "Version 7 stays" in page
