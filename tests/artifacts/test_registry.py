"""Drafter lines in a real MLflow on SQLite."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.artifacts.registry import CHALLENGER, PREVIOUS, ChampionMovedError, Registry
from draftsmith.artifacts.tracking import Tracking

LINE = "tiny-dflash"


def ref(folder: Path, name: str) -> ArtifactRef:
    """An artifact with a drafter's folder."""
    path = folder / "store" / "opd" / name
    (path / "drafter").mkdir(parents=True)
    (path / "drafter" / "config.json").write_text("{}")
    return ArtifactRef("opd", f"key-{name}", f"content-{name}", path)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Registry(Tracking(tmp_path / "home"))


def test_a_line_keeps_who_served_when_and_why(registry: Registry, tmp_path: Path) -> None:
    assert registry.champion(LINE) is None and registry.versions(LINE) == [] and registry.events(LINE) == []
    first = registry.register(LINE, ref(tmp_path, "a"), {"tau": "2.5", "figures": '{"tau": 2.5}'})
    assert registry.champion(LINE) is None
    challenger = registry.alias(LINE, CHALLENGER)
    assert challenger is not None and challenger.number == first.number
    registry.promote(first, expected=None, why="the first one")
    second = registry.register(LINE, ref(tmp_path, "b"), {})
    champion = registry.champion(LINE)
    assert champion is not None
    assert (champion.number, champion.content_id, champion.key) == (1, "content-a", "key-a")
    assert champion.path == tmp_path / "store" / "opd" / "a"
    assert champion.figures() == {"tau": 2.5}
    registry.promote(second, expected=champion, why="tau +0.3")
    assert [version.aliases for version in registry.versions(LINE)] == [("previous",), ("champion",)]
    registry.promote(first, expected=second, why="latency", what="rolled back")
    now, before = registry.champion(LINE), registry.alias(LINE, PREVIOUS)
    assert now is not None and before is not None
    assert (now.number, before.number) == (1, 2)
    told = [(event.what, event.version, event.before, event.why) for event in registry.events(LINE)]
    assert told == [
        ("promoted", 1, None, "the first one"), ("promoted", 2, 1, "tau +0.3"), ("rolled back", 1, 2, "latency"),
    ]  # fmt: skip


def test_a_line_keeps_what_drift_checks_saw(registry: Registry, tmp_path: Path) -> None:
    assert registry.drift(LINE) == []
    registry.register(LINE, ref(tmp_path, "a"), {})
    seen = [{"at": f"2026-01-0{day}", "version": 1, "tau": tau} for day, tau in ((1, 3.0), (2, 3.0), (3, 2.5))]
    for each in seen:
        registry.add_drift(LINE, each)
    assert registry.drift(LINE) == [seen[0], seen[2]], "the same check, planned again, is one point"


def test_the_same_content_is_registered_once(registry: Registry, tmp_path: Path) -> None:
    made = ref(tmp_path, "a")
    assert registry.register(LINE, made, {"tau": "2.5"}).number == registry.register(LINE, made, {"tau": "2.6"}).number
    (version,) = registry.versions(LINE)
    assert version.tags["tau"] == "2.6"


def test_of_two_refreshes_that_promote_at_once_the_second_decides_again(registry: Registry, tmp_path: Path) -> None:
    first = registry.register(LINE, ref(tmp_path, "a"), {})
    registry.promote(first, expected=None, why="the first one")
    rivals = [registry.register(LINE, ref(tmp_path, name), {}) for name in "bc"]
    refused: list[ChampionMovedError] = []

    def promote(rival: int) -> None:
        try:
            registry.promote(rivals[rival], expected=first, why="better")
        except ChampionMovedError as error:
            refused.append(error)

    racers = [threading.Thread(target=promote, args=[rival]) for rival in (0, 1)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(refused) == 1 and "decide again" in str(refused[0])
    assert len(registry.events(LINE)) == 2


def test_a_name_resolves_to_a_version_or_says_what_there_is(registry: Registry, tmp_path: Path) -> None:
    first = registry.register(LINE, ref(tmp_path, "a"), {})
    registry.promote(first, expected=None, why="the first one")
    for text in (LINE, f"{LINE}@champion", f"{LINE}@1"):
        assert registry.resolve(text).number == 1
    for text, said in (
        (f"{LINE}@previous", r"has no previous: its versions are @1"),
        (f"{LINE}@7", r"has no version 7: it has 1"),
        ("nobody@champion", "no refresh has registered a drafter under this name"),
    ):
        with pytest.raises(DraftsmithError, match=said):
            registry.resolve(text)


def test_weights_are_uploaded_for_servers_that_do_not_share_the_store(registry: Registry, tmp_path: Path) -> None:
    tracking = registry._tracking
    run_id = tracking.open_refresh("week-1", {})
    version = registry.register(LINE, ref(tmp_path, "a"), {}, run_id=run_id, upload=True)
    tracking.close_refresh("FINISHED")
    assert version.tags["uploaded"] == f"runs:/{run_id}/drafter"
    client, _ = tracking.connect()
    assert [file.path for file in client.list_artifacts(run_id, "drafter")] == ["drafter/config.json"]
