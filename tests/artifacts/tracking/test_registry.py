"""Model lines in a real MLflow on SQLite."""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import shutil
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from draftsmith.artifacts.errors import EXIT_USER_ERROR, DraftsmithError, RetryableError
from draftsmith.artifacts.locks import user_name
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.tracking import registry as registry_module
from draftsmith.artifacts.tracking.refresh_runs import RefreshRun
from draftsmith.artifacts.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    ChampionMovedError,
    Registry,
    Version,
)
from draftsmith.artifacts.tracking.runs import Tracking
from tests.testbed.artifacts import fake_artifact


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def ref(folder: Path, name: str) -> Artifact:
    """Create an artifact with a drafter's folder."""
    path = folder / "store" / "opd" / name
    (path / "drafter").mkdir(parents=True)
    (path / "drafter" / "config.json").write_text("{}")
    return fake_artifact("opd", sha256(f"key of {name}"), sha256(f"content of {name}"), path)


def serving(registry: Registry, line: str) -> tuple[int | None, int | None]:
    """Return the version numbers of `champion` and `previous`."""
    found = registry.champion(line), registry.alias(line, PREVIOUS)
    return found[0].number if found[0] else None, found[1].number if found[1] else None


@pytest.fixture
def line() -> str:
    """A line that no other test uses."""
    return f"line-{secrets.token_hex(4)}"


def test_a_line_records_which_version_served_when_and_why(line: str, registry: Registry, tmp_path: Path) -> None:
    assert registry.champion(line) is None and registry.versions(line) == [] and registry.events(line) == []
    first = registry.register(line, ref(tmp_path, "a"), {"tau": "2.5", "figures": '{"all": {"tau": 2.5}}'})
    assert registry.champion(line) is None
    challenger = registry.alias(line, CHALLENGER)
    assert challenger is not None and challenger.number == first.number
    registry.promote(first, expected=None, why="the first one")
    second = registry.register(line, ref(tmp_path, "b"), {})
    champion = registry.champion(line)
    assert champion is not None
    assert (champion.number, champion.content_id, champion.key) == (1, sha256("content of a"), sha256("key of a"))
    assert champion.path == tmp_path / "store" / "opd" / "a"
    assert champion.metrics() == {"all": {"tau": 2.5}}
    registry.promote(second, expected=champion, why="tau +0.3")
    assert [version.aliases for version in registry.versions(line)] == [("previous",), ("champion",)]
    registry.promote(first, expected=second, why="latency", what="rolled back")
    assert serving(registry, line) == (1, 2)
    events = [(event.what, event.version, event.before, event.why) for event in registry.events(line)]
    assert events == [
        ("promoted", 1, None, "the first one"), ("promoted", 2, 1, "tau +0.3"), ("rolled back", 1, 2, "latency"),
    ]  # fmt: skip


def test_a_version_has_few_tags_and_all_of_them_are_read_back(line: str, registry: Registry, tmp_path: Path) -> None:
    """Also of a version that was registered when each was a tag."""
    details = {f"n{number}": str(number) for number in range(20)}
    tags = {"tau": "2.5", "outcome": "promoted", "figures": '{"all": {"tau": 2.5}}', **details}
    made = ref(tmp_path, "a")
    version = registry.register(line, made, tags)
    registry.tag(version, {"refreshed_at": "2026-12-01T00:00:00+00:00", "n3": "three", "server.gpu1:30000": "{}"})
    client, _ = registry._tracking.connect()
    stored = client.get_model_version(line, "1").tags
    shown = ("outcome", "refreshed_at", "server.gpu1:30000", "tau", "version_record")
    assert sorted(stored) == [f"draftsmith.{name}" for name in shown]
    found = registry.version(line, 1)
    assert found.tags.items() >= {**tags, "n3": "three"}.items()
    assert (found.key, found.metrics()) == (made.key, {"all": {"tau": 2.5}})
    assert registry.content_ids() >= {made.content_id}

    client.set_model_version_tag(line, "1", "draftsmith.figures", "{}")
    registry.register(line, made, {"figures": '{"all": {"tau": 3}}'})
    assert registry.version(line, 1).metrics() == {"all": {"tau": 3}}, "the record counts"
    identity = {"stage": found.stage, "key": found.key, "content_id": found.content_id}
    for name, value in {**found.tags, **identity}.items():
        client.set_model_version_tag(line, "1", f"draftsmith.{name}", value)
    client.delete_model_version_tag(line, "1", "draftsmith.version_record")
    registry.promote(found, expected=None, why="an earlier release did")
    champion = registry.champion(line)
    assert champion is not None
    assert (champion.key, champion.metrics(), champion.tags["n3"]) == (made.key, {"all": {"tau": 2.5}}, "three")
    client.set_model_version_tag(line, "1", "draftsmith.version_record", '["a list"]')
    with pytest.raises(
        DraftsmithError, match=r"version 1: tag draftsmith\.version_record: not a JSON object of texts\."
    ):
        registry.versions(line)
    client.delete_registered_model(line)  # the other tests list all versions


def test_a_promotion_by_hand_keeps_the_gates_reason(line: str, registry: Registry, tmp_path: Path) -> None:
    version = registry.register(line, ref(tmp_path, "a"), {"decision": "tau fell by 3 %"})
    registry.promote(version, expected=None, why="approved by QA", what="promoted by hand")
    client, _ = registry._tracking.connect()
    text = client.get_registered_model(line).description
    assert "approved by QA" in text and "Its gate: tau fell by 3 %" in text
    registry.promote(version, expected=version, why="tau fell by 3 %")
    assert client.get_registered_model(line).description.count("tau fell by 3 %") == 1


def test_a_line_records_results_of_drift_checks(line: str, registry: Registry, tmp_path: Path) -> None:
    assert registry.drift(line) == []
    registry.register(line, ref(tmp_path, "a"), {})
    seen = [{"at": f"2026-01-0{day}", "version": 1, "tau": tau} for day, tau in ((1, 3.0), (2, 3.0), (3, 2.5))]
    for each in seen:
        registry.add_drift(line, each)
    assert [each.to_json() for each in registry.drift(line)] == [seen[0], seen[2]], (
        "the same check, planned again, is one point"
    )
    client, _ = registry._tracking.connect()
    assert list(client.get_registered_model(line).tags) == ["draftsmith.drift.000000"]
    client.set_registered_model_tag(line, "draftsmith.drift.000001", json.dumps(seen[1]))  # of an earlier release
    more = [{"at": f"2026-02-{day:02d}", "version": 1, "tau": day, "decision": "x" * 1000} for day in range(1, 10)]
    for each in more:
        registry.add_drift(line, each)
    assert [each.to_json() for each in registry.drift(line)] == [seen[0], seen[2], seen[1], *more]
    texts = client.get_registered_model(line).tags
    assert len(texts) == 4 and max(map(len, texts.values())) <= 4500


def test_a_name_resolves_to_a_version_or_the_error_lists_versions(
    line: str, registry: Registry, tmp_path: Path
) -> None:
    first = registry.register(line, ref(tmp_path, "a"), {})
    registry.promote(first, expected=None, why="the first one")
    for text in (line, f"{line}@champion", f"{line}@1"):
        assert registry.resolve(text).number == 1
    for text, message in (
        (f"{line}@previous", r"has no previous\. Its versions are @1"),
        (f"{line}@7", r"has no version 7\. It has 1"),
        ("nobody@champion", "no refresh has registered a drafter under this name"),
    ):
        with pytest.raises(DraftsmithError, match=message):
            registry.resolve(text)


def test_a_failed_request_is_not_taken_for_a_missing_version(
    line: str, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register(line, ref(tmp_path, "a"), {})
    ask, asked = MlflowClient.get_model_version, list[str]()

    def lost_once(self: MlflowClient, name: str, version: str) -> ModelVersion:
        asked.append(version)
        if len(asked) == 1:
            raise MlflowException("API request to http://mlflow failed: 503")
        return ask(self, name, version)

    monkeypatch.setattr(MlflowClient, "get_model_version", lost_once)
    with pytest.raises(RetryableError, match="503"):
        registry.version(line, 1)
    assert registry.version(line, 1).number == 1
    with pytest.raises(DraftsmithError, match=r"has no version 7\. It has 1"):
        registry.version(line, 7)
    with pytest.raises(DraftsmithError, match=r"nobody has no version 1\. It has none"):
        registry.version("nobody", 1)


def test_weights_are_uploaded_and_downloaded_without_the_store(line: str, registry: Registry, tmp_path: Path) -> None:
    refresh = RefreshRun(registry._tracking, "week-1", {})
    run_id = refresh.open()
    made = ref(tmp_path, "a")
    version = registry.register(line, made, {}, run_id=run_id)
    with pytest.raises(RetryableError, match="has no run of this refresh"):
        registry.upload(version, made.path / "drafter", None)
    registry.upload(version, made.path / "drafter", run_id)
    refresh.close("FINISHED")
    version = registry.register(line, made, {})  # again, as by the next attempt of a killed run
    assert version.uploaded == f"runs:/{run_id}/drafter"
    shutil.rmtree(tmp_path / "store")
    copy = registry.download(version, tmp_path)
    assert [path.name for path in copy.iterdir()] == ["config.json"]
    for gone in (f"runs:/{run_id}/another", "runs:/nobody/drafter"):
        with pytest.raises(DraftsmithError, match=rf"version 1: MLflow no longer has {gone}\. Restore that run"):
            registry.download(replace(version, tags={"uploaded": gone}), tmp_path)


def test_the_second_of_two_homes_that_share_only_mlflow_must_decide_again(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share no file lock: the other one promotes just after this one has written its event."""
    monkeypatch.setattr(registry_module, "_RIVAL_S", 0.1)  # this one's promotion cannot end while the other one waits
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/shared.db")
    here, there = (Registry(Tracking(tmp_path / name)) for name in ("here", "there"))
    first = here.register(line, ref(tmp_path, "a"), {})
    here.promote(first, expected=None, why="the first one")
    ours, theirs = here.register(line, ref(tmp_path, "b"), {}), there.register(line, ref(tmp_path, "c"), {})
    write = MlflowClient.set_registered_model_tag

    def overtaken(self: MlflowClient, *arguments: str) -> None:
        write(self, *arguments)
        with monkeypatch.context() as undisturbed:
            undisturbed.setattr(MlflowClient, "set_registered_model_tag", write)
            there.promote(theirs, expected=first, why="better")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "set_registered_model_tag", overtaken)
        with pytest.raises(ChampionMovedError):
            here.promote(ours, expected=first, why="better")
    assert [event.version for event in here.events(line)] == [first.number, theirs.number]
    assert serving(here, line) == (theirs.number, first.number)


class TwoHomes:
    """Two homes that share only MLflow, a champion, and a challenger of each that it may promote."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/shared.db")
        monkeypatch.setattr(registry_module, "_POLL_S", 0.01)
        self.here, self.there = (Registry(Tracking(folder / name)) for name in ("here", "there"))
        self.line, self.first = line, self.here.register(line, ref(folder, "a"), {})
        self.here.promote(self.first, expected=None, why="the first one")
        self.ours, self.theirs = (
            home.register(line, ref(folder, name), {}) for home, name in ((self.here, "b"), (self.there, "c"))
        )

    def promote(self, registry: Registry, version: Version) -> str:
        """Promote a version against the first one, and return what the command says."""
        try:
            registry.promote(version, expected=self.first, why="better")
        except ChampionMovedError as error:
            return str(error)
        return "promoted"

    def agree(self) -> int:
        """Return the number of the champion, which history and aliases of both homes name."""
        champion = self.here.champion(self.line)
        assert champion is not None and self.there.champion(self.line) == champion
        assert serving(self.here, self.line) == (champion.number, self.first.number)
        assert [event.version for event in self.here.events(self.line)] == [self.first.number, champion.number]
        return champion.number


@pytest.mark.parametrize("looks_first", [False, True])
def test_of_two_promotions_at_once_one_is_told_that_it_does_not_count(
    looks_first: bool, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both homes find the champion that they expect, then ours moves the alias, then the other one does.

    looks_first: whether ours looks at the outcome before the other one moves the alias.
    """
    homes = TwoHomes(tmp_path, monkeypatch, line)
    compared, go, done = threading.Barrier(2, timeout=60), threading.Event(), threading.Event()
    move, rivals = MlflowClient.set_registered_model_alias, Registry._rivals

    def moving(self: MlflowClient, name: str, alias: str, version: str) -> None:
        if alias != CHAMPION:
            move(self, name, alias, version)
            return
        compared.wait()
        if version == str(homes.theirs.number):
            assert go.wait(60)
            move(self, name, alias, version)
            done.set()
        else:
            move(self, name, alias, version)
            if not looks_first:
                go.set()
                assert done.wait(60)

    def looking(self: Registry, *arguments: Any) -> list[str]:
        found = rivals(self, *arguments)
        if self is homes.here:
            go.set()
        return found

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", moving)
    monkeypatch.setattr(Registry, "_rivals", looking)
    with ThreadPoolExecutor(1) as thread:
        there = thread.submit(homes.promote, homes.there, homes.theirs)
        here = homes.promote(homes.here, homes.ours)
    assert homes.agree() == homes.theirs.number, "the last one to move the alias"
    assert there.result() == "promoted"
    by = f"{user_name()}@{platform.node()}"
    assert here.startswith(f"{line}: version 3 was promoted by {by} at the same time and is the champion, version 2 is")


def test_a_promotion_that_was_killed_elsewhere_is_removed_and_finds_out_if_it_lives(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other home stops before it moves the alias, for longer than ours waits, and goes on."""
    homes, move = TwoHomes(tmp_path, monkeypatch, line), MlflowClient.set_registered_model_alias
    monkeypatch.setattr(registry_module, "_RIVAL_S", 0.05)
    compared, go = threading.Event(), threading.Event()

    def moving(self: MlflowClient, name: str, alias: str, version: str) -> None:
        if alias == CHAMPION and version == str(homes.theirs.number):
            compared.set()
            assert go.wait(60)
        move(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", moving)
    with ThreadPoolExecutor(1) as thread:
        there = thread.submit(homes.promote, homes.there, homes.theirs)
        assert compared.wait(60)
        assert homes.promote(homes.here, homes.ours) == "promoted"
        go.set()
    assert homes.agree() == homes.ours.number
    assert "version 2 was promoted by" in there.result()


def test_a_database_of_another_mlflow_version_is_not_retryable(registry: Registry, tmp_path: Path) -> None:
    registry.versions("none")  # makes the database
    shutil.copy(registry._tracking.folder / "mlflow.db", tmp_path / "mlflow.db")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'before'")
    address = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = Tracking(tmp_path)
    for ask in (tracking.check, lambda: Registry(tracking).versions("none")):
        with pytest.raises(
            DraftsmithError, match=f"another version of MLflow.*run `mlflow db upgrade {address}`"
        ) as refused:
            ask()
        assert refused.value.exit_code == EXIT_USER_ERROR
