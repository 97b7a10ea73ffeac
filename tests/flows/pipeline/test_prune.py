"""Replaced artifacts are deleted only where the MLflow that is asked knows what this home's drafter lines need."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from draftsmith.artifacts.store import REPLACED, Claim, Store
from draftsmith.artifacts.tracking import Tracking
from draftsmith.flows.cli import main
from draftsmith.flows.pipeline import registered


@pytest.fixture
def replaced(home: Path) -> Path:
    """An artifact that was made again since, long ago."""
    with (store := Store(home / "store")).claim("opd", "ab" * 32) as claim:
        assert isinstance(claim, Claim)
        (claim.out / "x").write_text("first")
        made = store.commit(claim, config={}, inputs={}, code_digest="", seed=0).path
    aside = made.rename(made.with_name(f"{REPLACED}{made.name}-1"))
    for each in [aside, *aside.rglob("*")]:
        os.utime(each, (0, 0))
    return aside


def pruned(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["prune", "--delete"]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_what_is_replaced_stays_where_another_mlflow_has_the_lines(
    home: Path, replaced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as runs:
        runs.setenv("MLFLOW_TRACKING_URI", "http://user:hidden@mlflow.example:5000")
        registered.note(Tracking(home))
    assert "hidden" not in (home / registered.NOTE).read_text()
    said = pruned(capsys)
    assert replaced.exists() and not (home / "mlflow.db").exists(), "none is asked, or made"
    assert re.search(r"replaced artifacts are kept: versions were registered in http://\S+@mlflow\.example", said)
    assert f"set MLFLOW_TRACKING_URI as the runs have it, or remove from {home}/{registered.NOTE} those" in said

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    for _ in range(2):
        registered.note(Tracking(home))
    said = pruned(capsys)
    assert replaced.exists(), "it may be who serves there"
    assert re.search(rf"in http\S+, which sqlite\S+ does not know of; remove from {home}/{registered.NOTE} those", said)
    (home / registered.NOTE).write_text(f"sqlite:///{tmp_path}/runs.db\n")
    assert "removed" in pruned(capsys) and not replaced.exists()


def test_the_homes_own_database_is_where_no_address_is_set(
    home: Path, replaced: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / registered.NOTE).write_text("mlflow.db\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    said = "versions were registered in mlflow.db, which http://mlflow.example:5000 does not know of; unset MLFLOW_"
    assert said in pruned(capsys) and replaced.exists()


def test_the_homes_own_database_is_its_own_wherever_the_home_lies(
    home: Path, replaced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = pruned(capsys)
    assert "mlflow.db does not exist: runs of this home were tracked elsewhere" in said and replaced.exists()
    Tracking(home).connect()
    registered.note(Tracking(home))
    moved = home.rename(tmp_path / "moved")
    monkeypatch.setenv("DRAFTSMITH_HOME", str(moved))
    assert "removed" in pruned(capsys) and not list(moved.glob(f"store/opd/{REPLACED}*"))
