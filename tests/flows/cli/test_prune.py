"""Artifacts are deleted only if the MLflow server in use knows what this home's drafter lines need."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from draftsmith.artifacts.locks import locked
from draftsmith.artifacts.store.local import REPLACED, Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.tracking.registry import TRACKERS_FILE, Registry, note_tracker
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.cli.main import main
from draftsmith.flows.execution.display import Display
from draftsmith.flows.orchestration.run import Run
from draftsmith.flows.planning.graph import ALL_NODES
from draftsmith.flows.refresh import registry_commands
from tests.flows.toy import TOY, ToyConfig
from tests.testbed.artifacts import committed


@pytest.fixture
def replaced(home: Path) -> Path:
    """Return an artifact that was replaced long ago."""
    made = committed(Store(home / "store"), "opd", {"x": "first"}).path
    replaced = made.rename(made.with_name(f"{REPLACED}{made.name}-1"))
    for each in [replaced, *replaced.rglob("*")]:
        os.utime(each, (0, 0))
    return replaced


def pruned(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["prune", "--delete", *options]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("days", ["-1", "nan"])
def test_an_invalid_number_of_days_deletes_nothing(replaced: Path, days: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prune", "--days", days, "--delete"])
    assert ended.value.code == 2 and replaced.exists()


def test_artifacts_are_kept_if_another_mlflow_has_lines(
    home: Path, replaced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as runs:
        runs.setenv("MLFLOW_TRACKING_URI", "http://user:hidden@mlflow.example:5000")
        note_tracker(Tracking(home))
    assert "hidden" not in (home / TRACKERS_FILE).read_text()
    assert "mlflow.example" in pruned(capsys)
    assert replaced.exists() and not (home / "mlflow.db").exists(), "no database is asked or created"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    for _ in range(2):
        note_tracker(Tracking(home))
    assert "mlflow.example" in pruned(capsys) and replaced.exists(), "it may be the champion there"
    kept = artifact(Store(home / "store"), "rollout", "text")
    assert "mlflow.example" in pruned(capsys, "--artifacts", "--days", "0") and kept.path.exists()
    (home / TRACKERS_FILE).write_text(f"sqlite:///{tmp_path}/runs.db\n")
    assert "removed" in pruned(capsys) and not replaced.exists()


def test_the_homes_database_counts_as_another_mlflow_if_an_address_is_set(
    home: Path, replaced: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / TRACKERS_FILE).write_text("mlflow.db\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert "mlflow.db" in pruned(capsys) and replaced.exists()


def test_a_moved_home_still_recognises_its_database(
    home: Path, replaced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "mlflow.db" in pruned(capsys) and replaced.exists()
    Tracking(home).connect()
    note_tracker(Tracking(home))
    moved = home.rename(tmp_path / "moved")
    monkeypatch.setenv("DRAFTSMITH_HOME", str(moved))
    assert "removed" in pruned(capsys) and not list(moved.glob(f"store/opd/{REPLACED}*"))


def artifact(store: Store, stage: str, content: str, inputs: dict[str, Artifact] | None = None) -> Artifact:
    key = hashlib.sha256(f"{stage} {content}".encode()).hexdigest()
    return committed(store, stage, {"x": content}, key, inputs=inputs or {})


def test_the_champion_its_predecessor_and_their_inputs_are_kept(home: Path) -> None:
    """Register four drafters of a line: the first two served in turn, the third was refused, the fourth is new."""
    store, lines = Store(home / "store"), Registry(Tracking(home))
    Tracking(home).connect()
    note_tracker(Tracking(home))
    answers = [artifact(store, "rollout", f"answers {week}") for week in range(4)]
    drafters = [artifact(store, "opd", f"drafter {week}", {"answers": each}) for week, each in enumerate(answers)]
    champion = None
    for week, ref in enumerate(drafters):
        version = lines.register("line", ref, {})
        if week < 2:
            lines.promote(version, expected=champion, why="it is faster")
            champion = version
    for _ in range(2):
        assert main(["prune", "--artifacts", "--days", "0"]) == 0, "it only lists"
    assert main(["prune", "--artifacts", "--delete"]) == 0 and all(each.path.exists() for each in drafters), "too new"
    assert main(["prune", "--days", "0", "--delete"]) == 0 and all(each.path.exists() for each in drafters)
    assert main(["prune", "--artifacts", "--days", "0", "--delete"]) == 0
    assert [each.path.exists() for each in drafters] == [each.path.exists() for each in answers]
    assert [each.path.exists() for each in drafters] == [True, True, False, True]
    assert main(["promote", "line@3"]) == 2


def test_nothing_is_deleted_while_a_run_is_alive(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Tracking(home).connect()
    kept = artifact(Store(home / "store"), "rollout", "text")
    for lock in (home / "refreshes" / ".lock-abc", home / "store" / "sft" / ".lock-def"):
        with locked(lock):
            assert main(["prune", "--artifacts", "--days", "0", "--delete"]) == 2
            assert str(lock) in "".join(capsys.readouterr().err.split())
            assert main(["prune", "--artifacts", "--days", "0"]) == 0 and kept.path.exists()


def test_runs_and_promotions_block_pruning(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = artifact(Store(home / "store"), "opd", "text")
    version = Registry(Tracking(home)).register("line", made, {})
    pruned: list[int] = []

    def prune(*_: object, **__: object) -> None:
        pruned.append(main(["prune", "--artifacts", "--days", "0", "--delete"]))

    Run(TOY, ToyConfig(name="toy"), ALL_NODES).do(prune)
    monkeypatch.setattr(registry_commands, "verify_checkpoint", prune)
    registry_commands.promote(Display(), f"line@{version.number}", "", dry_run=False)
    assert pruned == [2, 2]
