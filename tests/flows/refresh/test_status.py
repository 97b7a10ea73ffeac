"""What `draftsmith status` and `run --plan` tell of a line: its page, and what the next refresh would make."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.tracking.refresh_runs import CONTINUE, OUTCOME, RefreshRun
from draftsmith.artifacts.tracking.runs import NOTE, Tracking
from draftsmith.artifacts.tracking.terms import Status as Ended
from draftsmith.flows.cli.main import main
from draftsmith.flows.planning.plan import Status, plan
from draftsmith.flows.refresh.champion import resolve
from draftsmith.flows.refresh.graph import REFRESH
from draftsmith.stages.data.logs.earlier import TABLE
from tests.flows.processes import ROOT, environment
from tests.flows.refresh.line_runs import config_of, finished, gated
from tests.testbed.artifacts import committed, fake_artifact
from tests.testbed.refresh import load_config

Shown = Callable[..., str]


@pytest.fixture
def shown(home: Path, capsys: pytest.CaptureFixture[str]) -> Shown:
    """Run a command that succeeds, and return what it prints."""
    assert home

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def ended(home: Path, line: str, status: Ended, note: str, outcome: str = "") -> None:
    """Write the run of a refresh to MLflow as a refresh does."""
    record = RefreshRun(Tracking(home, line), "weekly", {})
    record.open()
    record.close(status, {}, {}, [], {NOTE: note, **({OUTCOME: outcome} if outcome else {})})


def last_of(page: str) -> str:
    (line,) = (line for line in page.splitlines() if line.startswith("last refresh: "))
    return line.removeprefix("last refresh: ")


def test_the_page_of_a_line_has_its_champion_data_outcome_and_servers(
    line: str, home: Path, drafters: list[Artifact], shown: Shown
) -> None:
    with pytest.raises(AssertionError, match="no refresh has registered a drafter"):
        shown("status", line)
    store, logs = Store(home / "store"), home / "logs"
    given_by = {"target_digest": "5" * 64, "tokenizer_digest": "6" * 64}
    summary = {
        "given_by": given_by,
        "used": 1800,
        "window": {"since": "2026-11-20T08:00:00+00:00", "newest": "2026-11-27T08:00:00+00:00"},
    }
    logs.mkdir(parents=True)
    (logs / "logs.json").write_text(json.dumps(summary))
    (logs / TABLE).write_text("")
    finished(config_of(line), gated(store, drafters[0]) | {"logs": fake_artifact("logs", "3" * 64, "4" * 64, logs)})
    ended(home, line, "FINISHED", "**Promoted.** it is faster", "promoted")
    page = shown("status", line)
    assert "champion: version 1 since 20" in page and "promoted: why; tau 2.500; speed-up 1.200" in page
    assert "its data: 1,800 logged answers from 2026-11-20" in page and "until 2026-11-27" in page
    assert last_of(page).startswith("PROMOTED, 20") and last_of(page).endswith(": it is faster")
    assert "servers: none is known" in page and "next run: unknown: PREFECT_API_URL" in page
    other = f"{line}-prompts"
    finished(config_of(other), gated(store, drafters[1]))
    assert "its data" not in shown("status", other)


def test_the_last_outcome_is_the_refreshs_or_what_a_person_did_since(
    line: str, home: Path, drafters: list[Artifact], shown: Shown
) -> None:
    store = Store(home / "store")
    finished(config_of(line), gated(store, drafters[0]))
    ended(home, line, "FINISHED", "**Promoted.** it is faster", "promoted")
    ended(home, line, "FINISHED", r"**Current.** tau of \[a slice is 2.5" + "\n\nmore", "current")
    assert last_of(shown("status", line)).startswith("CURRENT, ") and "tau of [a slice is 2.5" in shown("status", line)
    ended(home, line, "FINISHED", "**No action yet.**")  # until a node
    assert last_of(shown("status", line)).startswith("CURRENT, ")
    command = f"{CONTINUE} `draftsmith run weekly.yaml --force drift`."
    ended(home, line, "FAILED", f"**Failed.** the disk is full. {command}\n\nwhat was measured")
    assert last_of(shown("status", line)).endswith(f": the disk is full. {command}")
    finished(config_of(line), gated(store, drafters[1]))
    assert f"`draftsmith swap {line} --url URL`" in shown("rollback", line, "--why", "it stutters")
    page = last_of(shown("status", line))
    assert page.startswith("ROLLED BACK, ") and "version 1 serves" in page and page.endswith(": it stutters")


def test_a_lines_first_refresh_that_was_killed_tells_its_command(line: str, home: Path, shown: Shown) -> None:
    program = (
        "import os, signal; from draftsmith.artifacts.home import home; "
        "from draftsmith.artifacts.tracking.refresh_runs import RefreshRun; "
        "from draftsmith.artifacts.tracking.runs import Tracking; "
        f"run = RefreshRun(Tracking(home(), {line!r}), 'weekly', {{}}); "
        "assert run.open(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    variables = environment(home, MLFLOW_TRACKING_URI=os.environ["MLFLOW_TRACKING_URI"])
    killed = subprocess.run(
        [sys.executable, "-c", program, "run", "my file.yaml", "--force", "drift"], cwd=ROOT, env=variables, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert "champion: none\n" in shown("status", line)
    assert last_of(shown("status", line)).startswith("KILLED, ")
    assert last_of(shown("status", line)).endswith(f"{CONTINUE} `-c run 'my file.yaml' --force drift`.")


def test_a_promotion_that_waits_is_told_as_such(line: str, home: Path, drafters: list[Artifact], shown: Shown) -> None:
    store = Store(home / "store")
    finished(config_of(line), gated(store, drafters[0]))
    ended(home, line, "FINISHED", "**Promoted.** it is faster", "promoted")
    assert finished(config_of(line, registry={"name": line, "approve": True}), gated(store, drafters[1])).error
    page = last_of(shown("status", line))
    assert page.startswith("WAITING, ") and f"`draftsmith promote {line}@2`" in page
    (row,) = (row for row in shown("champions", line).splitlines() if "challenger" in row)
    assert "waiting" in row and "promoted" not in row
    shown("promote", f"{line}@2")
    assert "waiting" not in shown("champions", line)


def config_file(tmp_path: Path, line: str) -> Path:
    content = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    content["target"] = {**content["target"], "source": str(tmp_path)}
    path = tmp_path / "weekly.yaml"
    path.write_text(yaml.safe_dump({**content, "name": "weekly", "registry": {"name": line}}))
    return path


def test_after_a_promotion_a_plan_has_the_drift_check_first(
    line: str, home: Path, drafters: list[Artifact], tmp_path: Path, shown: Shown
) -> None:
    config, store = str(config_file(tmp_path, line)), Store(home / "store")
    assert "only if" not in shown("run", config, "--plan") + shown("status", config)
    finished(load_config(Path(config)), gated(store, drafters[0]))
    ended(home, line, "FINISHED", "**Promoted.** it is faster", "promoted")
    status = shown("status", config)
    assert "last refresh: PROMOTED, " in status and "GATE" not in status
    assert {"sft", "opd", "report"} <= conditional(status, "then, only if tau has fallen")
    assert not conditional(status, "waits for") & {"sft", "opd", "report"}

    begins, follows = shown("run", config, "--plan").split("then, only if tau has fallen:")
    assert " drift " in begins.replace("\n", " ") and "sft" not in begins and "sft" in follows
    assert "only if" not in shown("run", config, "--plan", "--force", "drift")
    assert "only if" not in shown("run", config, "--plan", "--restart")

    metrics = {"tau": 2.5, "low": 2.4, "high": 2.6, "prompts": 40}
    make_all_until_drift(config, store, metrics)
    current = shown("run", config, "--plan")
    (line_of_rest,) = (each for each in current.splitlines() if each.startswith("not made: the champion is current"))
    assert "sft" in line_of_rest and "report" in line_of_rest and "after" not in current.split("not made")[0]
    assert {"sft", "report"} <= conditional(shown("status", config), "not made: the champion is current")
    (drift,) = store.root.glob("drift/*/drift.json")
    drift.chmod(0o644)
    drift.write_text(json.dumps({"all": metrics | {"tau": 1.5, "low": 1.4, "high": 1.6}}))
    assert "only if" not in (fallen := shown("run", config, "--plan")) and "not made" not in fallen


def conditional(page: str, words: str) -> set[str]:
    """Return the nodes whose row has these words."""
    return {row.split()[0] for row in page.splitlines() if words in row}


def make_all_until_drift(path: str, store: Store, metrics: dict[str, float]) -> None:
    """Commit what a run reuses up to a drift check that found these metrics on all prompts."""
    config = resolve(load_config(Path(path)))
    files = {
        "drift": {"drift.json": json.dumps({"all": metrics})},
        "champion": {"champion.json": json.dumps({"target": "t", "target_changed": False, "trained_for": "t"})},
    }
    while True:
        planned = plan(config, store, REFRESH)
        item = next(item for item in planned if item.status in (Status.RUN, Status.RESUME))
        assert item.key is not None
        committed(store, item.node.stage.name, files.get(item.node.name, {"any": item.node.name}), item.key)
        if item.node.name == "drift":
            return
