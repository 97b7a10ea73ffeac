"""What an unfinished run began with: the same command goes on with it, though more files have come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.flows.pipeline import external
from draftsmith.flows.pipeline.external import as_begun, external_digests, note_begun, note_ended
from draftsmith.flows.pipeline.graph import plan
from draftsmith.stages.contract import Config
from draftsmith.stages.logs import LogsConfig
from tests.flows.pipeline.processes import run_toy
from tests.flows.pipeline.toy import TOY, ToyConfig, write_config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two logs that a run has begun with, and one more."""
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    path = tmp_path / "logs"
    path.mkdir()
    for name in "ab":
        (path / f"{name}.jsonl").write_text("{}\n")
    config = logs(path)
    note_begun("weekly", "logs", config, external_digests(config))
    (path / "c.jsonl").write_text("{}\n")
    return path


def logs(path: Path, **more: Any) -> LogsConfig:
    return LogsConfig(paths=[str(path)], temperature=0, **more)


def read_by(config: Config) -> list[str]:
    return [path.name for path in config.external_files()]


def test_a_run_goes_on_with_the_files_that_it_began_with(folder: Path) -> None:
    assert read_by(as_begun("weekly", "logs", logs(folder))) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("what", ["other run", "other node", "other config", "a file changed", "a file went", "ended"])
def test_else_it_reads_what_is_there(what: str, folder: Path) -> None:
    run, node = ("monthly" if what == "other run" else "weekly"), ("prompts" if what == "other node" else "logs")
    config = logs(folder, **({"max_tokens": 9} if what == "other config" else {}))
    if what == "a file changed":
        (folder / "a.jsonl").write_text("{}\n{}\n")
    if what == "a file went":
        (folder / "a.jsonl").unlink()
    if what == "ended":
        note_ended("weekly")
    assert as_begun(run, node, config).listed_files is None


def test_one_that_has_ended_is_gone_on_with_if_some_of_it_is_wanted_again(folder: Path) -> None:
    note_ended("weekly")
    config = as_begun("weekly", "logs", logs(folder), ended=True)
    assert read_by(config) == ["a.jsonl", "b.jsonl"]
    note_begun("weekly", "logs", config, external_digests(config))
    assert read_by(as_begun("weekly", "logs", logs(folder))) == ["a.jsonl", "b.jsonl"], "until it has ended too"


def test_next_week_begins_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = as_begun("weekly", "logs", logs(folder))
    monkeypatch.setattr(external, "_GOES_ON_S", 0.0)
    assert as_begun("weekly", "logs", logs(folder)).listed_files is None
    note_begun("weekly", "logs", config, external_digests(config))  # a run that goes on begins no later for it
    assert as_begun("weekly", "logs", logs(folder)).listed_files is None


def test_a_folder_that_is_read_whole_is_no_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole(Config):
        def external_files(self) -> list[Path]:
            return sorted(tmp_path.glob("*.bin"))

    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    (tmp_path / "a.bin").write_text("a")
    note_begun("weekly", "target", Whole(), external_digests(Whole()))
    (tmp_path / "b.bin").write_text("b")
    assert as_begun("weekly", "target", Whole()).listed_files is None


def test_notes_that_cannot_be_written_or_read_stop_nothing(folder: Path, tmp_path: Path) -> None:
    (note,) = (tmp_path / "home" / "begun").iterdir()
    note.write_text('{"logs": ')
    assert as_begun("weekly", "logs", logs(folder)).listed_files is None
    note.unlink()
    note.parent.rmdir()
    note.parent.write_text("a file in the way")
    note_begun("weekly", "logs", logs(folder), external_digests(logs(folder)))
    note_ended("weekly")


@pytest.mark.integration
def test_what_was_made_before_a_failure_is_reused_though_files_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, numbers, allow = tmp_path / "home", tmp_path / "numbers", tmp_path / "allow"
    numbers.mkdir()
    (numbers / "a").write_text("100")
    left, total = {"addends": str(numbers / "*")}, {"allow": str(allow)}
    config = write_config(tmp_path / "toy.yaml", left=left, total=total)
    assert run_toy(home, "refresh", config).returncode == 2

    (numbers / "b").write_text("1000")
    monkeypatch.setenv("DRAFTSMITH_HOME", str(home))
    from draftsmith.artifacts.store import Store

    given = ToyConfig.model_validate({"name": "toy", "left": left, "total": {"allow": allow}})
    asked = {item.node.name: item for item in plan(given, Store(home), TOY, ["left"])}
    assert read_by(asked["left"].node.config) == ["a", "b"], "what is forced reads what is there"

    allow.touch()
    went_on = run_toy(home, "refresh", config)
    assert went_on.returncode == 0, went_on.stderr
    assert "left: goes on with the files that the last run began with (1)" in went_on.stdout
    assert "left: reused" in went_on.stdout
    of_total = run_toy(home, "refresh", config, "--force", "total")
    assert "left: reused" in of_total.stdout and "total: done in" in of_total.stdout
    alone = run_toy(home, "stage", "left", config)
    assert "left: reused" in alone.stdout, alone.stderr
    anew = run_toy(home, "refresh", config)
    assert "left: reused" not in anew.stdout and "left: done in" in anew.stdout
