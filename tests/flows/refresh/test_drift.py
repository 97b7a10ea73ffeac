"""Behind the drift check: whether a refresh of a line goes on, and what is said of it."""

from __future__ import annotations

from pathlib import Path

from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.artifacts.store import Store
from draftsmith.flows.refresh.course import RefreshCourse, resolve
from draftsmith.flows.refresh.line import registry
from tests.flows.refresh.made import checked, config_of, gated


def test_a_line_is_refreshed_when_its_last_refresh_is_too_old(
    line: str, home: Path, drafters: list[ArtifactRef]
) -> None:
    store = Store(home / "store")
    RefreshCourse(resolve(config_of(line)), ()).finish(gated(store, drafters[0]), None)

    def stops(force: tuple[str, ...] = (), restart: bool = False, **drift: float) -> str | None:
        config = resolve(config_of(line, drift=drift, registry={"name": line, "restart": restart}))
        ended = RefreshCourse(config, force).stop(*checked(config, home))
        return None if ended is None else ended.name

    (version,) = registry().versions(line)
    assert stops() == "Current"
    assert stops(force=("target",)) == "Current", "a new revision is looked for, not assumed"
    assert stops(force=("drift",)) is None and stops(force=("evaluation",)) is None and stops(restart=True) is None
    resolved = resolve(config_of(line))
    for force, kept in (("drift", {"drift"}), ("evaluation", {"drift"}), ("target", set())):
        assert RefreshCourse(resolved, (force,)).decisive == kept, "else the next one would find no reason to go on"
    assert registry().drift(line)[-1]["decision"] == "the line begins again (registry.restart)"
    registry().tag(version, {"promoted_at": "2020-01-01T00:00:00+00:00"})
    assert stops() == "Current", "what counts is the last refresh"
    registry().tag(version, {"refreshed_at": "2020-01-01T00:00:00+00:00"})
    assert stops() is None
    assert "the last refresh was" in registry().drift(line)[-1]["decision"]
    assert stops(max_age_days=36500) == "Current"
    RefreshCourse(resolve(config_of(line)), ()).finish(gated(store, drafters[1], "refused"), None)
    assert stops() == "Current", "a refresh that was refused is one"
