"""What an unfinished run began with: the same command goes on with it, though more files have come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, StageInterrupted
from draftsmith.flows.pipeline.begun import Begun, begin, note_begun, note_ended, note_failed, notes
from draftsmith.flows.pipeline.process import PastLimitError, StageFailedError
from draftsmith.stages.contract import Config
from draftsmith.stages.logs import LogsConfig
from draftsmith.stages.prompting import times
from draftsmith.stages.prompts import PromptsConfig
from draftsmith.stages.training.config import SftConfig

DAY = 86400.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two logs that a run has begun with, and one more."""
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    path = tmp_path / "logs"
    path.mkdir()
    for name in "ab":
        (path / f"{name}.jsonl").write_text("{}\n")
    note_begun("weekly", {"logs": listed(logs(path))})
    (path / "c.jsonl").write_text("{}\n")
    return path


def logs(path: Path, **more: Any) -> LogsConfig:
    return LogsConfig(paths=[str(path)], temperature=0, **more)


def listed(config: Config, known: Begun | None = None, *, ended: bool = False, days: float = 0) -> Begun:
    begun = begin(config, known, time.time() + days * DAY, ended=ended)
    assert begun is not None
    return begun


def read(config: Config, run: str = "weekly", node: str = "logs", *, ended: bool = False, days: float = 0) -> str:
    """The names of the files that a node of a run reads, so many days after."""
    begun = listed(config, notes(run).get(node), ended=ended, days=days)
    return "".join(path.stem for path in begun.read_by(config).external_files())


def test_a_run_goes_on_with_the_files_that_it_began_with(folder: Path) -> None:
    assert read(logs(folder)) == "ab"
    assert listed(logs(folder), notes("weekly")["logs"]).newer == 1
    (folder / "a.jsonl").write_text("{}\n{}\n")
    assert read(logs(folder)) == "ab", "with what these hold by then"


@pytest.mark.parametrize("what", ["other run", "other node", "other config", "a file went", "ended", "next week"])
def test_else_it_reads_what_is_there(what: str, folder: Path) -> None:
    run, node = ("monthly" if what == "other run" else "weekly"), ("prompts" if what == "other node" else "logs")
    config = logs(folder, **({"max_tokens": 9} if what == "other config" else {}))
    if what == "a file went":
        (folder / "a.jsonl").unlink()
    if what == "ended":
        note_ended("weekly")
    read_then = read(config, run, node, days=7 if what == "next week" else 0)
    assert read_then == ("bc" if what == "a file went" else "abc")


def test_one_that_has_ended_is_gone_on_with_if_some_of_it_is_wanted_again(folder: Path) -> None:
    note_ended("weekly")
    assert read(logs(folder), ended=True) == "ab"
    note_begun("weekly", {"logs": listed(logs(folder), notes("weekly")["logs"], ended=True)})
    assert read(logs(folder)) == "ab", "until it has ended too"


def test_a_run_that_goes_on_begins_no_later_for_it(folder: Path) -> None:
    note_begun("weekly", {"logs": listed(logs(folder), notes("weekly")["logs"], days=2)})
    assert read(logs(folder), days=4) == "abc"


def test_a_run_that_reads_what_is_there_begins_then_though_it_is_the_same(folder: Path) -> None:
    (folder / "c.jsonl").unlink()
    note_ended("weekly")
    note_begun("weekly", {"logs": listed(logs(folder), notes("weekly")["logs"], days=2)})
    (folder / "c.jsonl").write_text("{}\n")
    assert read(logs(folder), days=4) == "ab"


@pytest.mark.parametrize(
    ("error", "reads"),
    [
        (DraftsmithError("too few: give more logs"), "abc"),
        (RetryableError("the bucket does not answer"), "ab"),
        (StageInterrupted("stopped"), "ab"),
        (PastLimitError("ran past its limit: it goes on from what it saved"), "ab"),
        (StageFailedError("was killed"), "ab"),
        (ValueError("unforeseen"), "ab"),
    ],
    ids=["its input", "lost outside", "interrupted", "time limit", "killed", "unforeseen"],
)
def test_what_failed_for_its_input_reads_what_is_there_next_time(error: Exception, reads: str, folder: Path) -> None:
    note_failed("weekly", error, "prompts")
    assert read(logs(folder)) == "ab", "it was made"
    note_failed("weekly", error, "logs")
    assert read(logs(folder)) == reads


def test_a_stage_that_is_made_alone_goes_on_with_no_run_of_last_week(folder: Path) -> None:
    note_begun("weekly", {"logs": listed(logs(folder), days=7)}, alone=True)
    (folder / "d.jsonl").write_text("{}\n")
    assert read(logs(folder), days=7) == "abcd"


def test_a_stage_that_is_made_alone_begins_no_run_and_ends_none(folder: Path) -> None:
    note_begun("weekly", {"logs": listed(logs(folder))}, alone=True)
    (folder / "d.jsonl").write_text("{}\n")
    assert read(logs(folder)) == "abc", "the run goes on with what was made"
    note_ended("weekly")
    note_begun("weekly", {"logs": listed(logs(folder))}, alone=True)
    (folder / "e.jsonl").write_text("{}\n")
    assert read(logs(folder), ended=True) == "abcd" and read(logs(folder)) == "abcde"


@pytest.mark.parametrize("since", ["7d", "12h"])
def test_a_window_begins_where_it_began(since: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        at = datetime(2026, 3, 2, 23, 0, tzinfo=UTC)

        @classmethod
        def now(cls, _zone: Any = None) -> Any:
            return cls.at

    def configs() -> list[Config]:
        source = {"kind": "jsonl", "path": str(folder), "since": since}
        prompts = PromptsConfig.model_validate({"sources": [source], "train": 0, "heldout": 1})
        return [logs(folder, since=since), prompts]

    monkeypatch.setattr(times, "datetime", Clock)
    evening, began = configs(), Clock.at.timestamp()
    begun = [begin(each, None, began) for each in evening]
    Clock.at = datetime(2026, 3, 3, 8, 0, tzinfo=UTC)
    (folder / "d.jsonl").write_text("{}\n")
    for before, now, known in zip(evening, configs(), begun, strict=True):
        assert now.key_material() != before.key_material()
        goes_on = begin(now, known, Clock.at.timestamp())
        assert goes_on is not None and goes_on.newer == 1
        assert goes_on.read_by(now).key_material() == before.key_material()


def test_what_lists_no_files_is_not_noted() -> None:
    assert begin(SftConfig(), None, 0.0) is None


def test_prompts_list_the_files_of_all_their_sources(folder: Path) -> None:
    sources = [{"kind": "jsonl", "path": str(folder)}, {"kind": "jsonl", "path": str(folder / "*"), "since": "last"}]
    prompts = PromptsConfig.model_validate({"sources": sources, "train": 0, "heldout": 1})
    begun = listed(prompts)
    (folder / "d.jsonl").write_text("{}\n")
    assert listed(prompts, begun).newer == 1
    assert [path.stem for path in listed(prompts, begun).read_by(prompts).external_files()] == ["a", "b", "c"]


@pytest.fixture
def bucket() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    system.pipe_file("/begun-bucket/0.jsonl", b"{}\n")
    yield system
    system.rm("/begun-bucket", recursive=True)


def test_a_bucket_that_does_not_answer_is_asked_again(
    bucket: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a single refusal would bring other rows into a run that goes on."""
    config = LogsConfig(paths=["memory://begun-bucket/*.jsonl"], temperature=0)
    begun = listed(config)
    bucket.pipe_file("/begun-bucket/1.jsonl", b"{}\n")
    assert len(listed(config, begun).read_by(config).external_versions()) == 1

    def busy(*_arguments: object, **_named: object) -> None:
        raise OSError("503 Slow Down")

    monkeypatch.setattr(type(bucket), "glob", busy)
    with pytest.raises(RetryableError):
        listed(config, begun)


def test_notes_that_cannot_be_written_or_read_stop_nothing(folder: Path, tmp_path: Path) -> None:
    (note,) = (tmp_path / "home" / "begun").iterdir()
    for damaged in ('{"logs": ', "[]", '{"logs": {"at": 1}}'):
        note.write_text(damaged)
        assert read(logs(folder)) == "abc"
    note.unlink()
    note.parent.rmdir()
    note.parent.write_text("a file in the way")
    note_begun("weekly", {"logs": listed(logs(folder))})
    note_ended("weekly")
