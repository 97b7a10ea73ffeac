"""From the gate to the registry: a promotion with its hook, a refusal, and a champion that moved meanwhile."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.leftovers import leftovers
from draftsmith.artifacts.manifest import MANIFEST, ArtifactRef
from draftsmith.artifacts.open_store import STORE, store_of
from draftsmith.artifacts.registry import PREVIOUS, Registry, Version
from draftsmith.artifacts.store import REPLACED, Store
from draftsmith.artifacts.tracking import Tracking
from draftsmith.flows.pipeline.display import Display
from draftsmith.flows.pipeline.graph import Conclusion, OutdatedPlanError
from draftsmith.flows.pipeline.pruning import prune
from draftsmith.flows.refresh import commands
from draftsmith.flows.refresh.course import RefreshCourse, resolve
from draftsmith.flows.refresh.evaluate import evaluate_config, evaluate_nodes
from draftsmith.flows.refresh.graph import refresh_nodes
from draftsmith.flows.refresh.line import checkpoint_of, folder_of, registry
from draftsmith.stages.gate import DECISION
from draftsmith.stages.stored import DRAFTER_FOLDER
from tests.flows.refresh.made import checked, committed, config_of, gated, page_of

NOTE = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"
FAILS = "raise SystemExit('the server is away')"


def test_a_promotion_moves_the_alias_and_calls_the_hook(
    line: str, home: Path, drafters: list[ArtifactRef], tmp_path: Path
) -> None:
    store, told = Store(home / "store"), tmp_path / "told.json"
    first = RefreshCourse(resolve(config_of(line, on_promote={"command": [sys.executable, "-c", NOTE, str(told)]})), ())
    ended = first.finish(gated(store, drafters[0]), None)
    assert ended is not None and (ended.name, ended.error) == ("Promoted", None)
    assert ended.message.endswith("on_promote was called")
    decision = json.loads(told.read_text())
    assert (decision["line"], decision["version"], decision["promote"]) == (line, 1, True)
    assert decision["source"] == drafters[0].uri
    champion = registry().champion(line)
    assert champion is not None and champion.content_id == drafters[0].content_id
    figures = champion.figures()
    assert figures["all"] == {
        "tau": 2.5, "low": 2.4, "high": 2.6, "prompts": 40, "speedup": 1.2, "speedup_low": 1.15, "speedup_high": 1.25,
    }  # fmt: skip
    assert figures["chat"]["speedup_high"] == 1.3 and figures["chat"]["low"] == 2.4

    failing = resolve(config_of(line, on_promote={"command": [sys.executable, "-c", FAILS]}))
    ended = RefreshCourse(failing, ()).finish(gated(store, drafters[1]), None)
    assert ended is not None and ended.name == "Promoted" and ended.error is None
    assert "on_promote failed: " in ended.message and "(the server is away)" in ended.message
    champion, before = registry().champion(line), registry().alias(line, PREVIOUS)
    assert champion is not None and before is not None
    assert (champion.number, before.number) == (2, 1), "a failed hook undoes nothing"


@pytest.mark.parametrize(("outcome", "state"), [("refused", "Refused"), ("inconclusive", "Inconclusive")])
def test_what_is_not_promoted_becomes_a_version_and_no_champion(
    outcome: str, state: str, line: str, home: Path, drafters: list[ArtifactRef]
) -> None:
    ended = RefreshCourse(resolve(config_of(line)), ()).finish(gated(Store(home / "store"), drafters[0], outcome), None)
    assert ended is not None and ended.name == state
    assert ended.error is not None and ended.error.exit_code == 3
    assert registry().champion(line) is None
    (version,) = registry().versions(line)
    assert version.tags["decision"] == f"{outcome}: why" and version.aliases == ("challenger",)
    kind = {"refused": "broken", "inconclusive": "inconclusive"}[outcome]
    assert version.tags["rules"] == ended.tags["rules"] == f"{kind}: speed-up"
    assert len(ended.tags) <= 5 and "no champion" in description(home, line)


def description(home: Path, line: str) -> str:
    """Of the registered model."""
    return str(Tracking(home).connect()[0].get_registered_model(line).description)


def test_champions_fits_80_columns_and_says_why_a_version_was_not_promoted(
    line: str, home: Path, drafters: list[ArtifactRef]
) -> None:
    store, config = Store(home / "store"), config_of(line)
    report = committed(store, "report", "c", lambda out: (out / "report.html").write_text("<p>"))
    RefreshCourse(resolve(config), ()).finish({**gated(store, drafters[0]), "report": report}, None)
    RefreshCourse(resolve(config), ()).finish(gated(store, drafters[1], "inconclusive"), None)
    shown = io.StringIO()
    commands.champions(Display(Console(file=shown, width=80)), line)
    table = shown.getvalue().partition(" promoted (before: ")[0].splitlines()[1:-1]
    assert max(map(len, table)) <= 80 and "outcome" in table[0] and "why" in table[0]
    assert table[1].split()[:3] == ["1", "champion", "promoted"]
    assert table[2].split()[:4] == ["2", "challenger", "inconclusive", "inconclusive:"]
    assert "speed-up" in "".join(table[2:])
    told = description(home, line)
    assert "version 1" in told and "promoted: why" in told and str(report.path / "report.html") in told
    commands.promote(Display(), f"{line}@2", "it is faster in production", dry_run=False)
    told = description(home, line)
    assert "version 2" in told and "it is faster in production" in told and "report.html" not in told


def test_the_loser_of_two_refreshes_is_planned_again_against_the_new_champion(
    line: str, home: Path, drafters: list[ArtifactRef]
) -> None:
    store, config = Store(home / "store"), config_of(line)
    slow, fast = (RefreshCourse(resolve(config), ()) for _ in range(2))
    fast.finish(gated(store, drafters[0]), None)
    made = gated(store, drafters[1])
    with pytest.raises(OutdatedPlanError, match="version 1 is the champion by now"):
        slow.finish(made, None)
    assert [version.number for version in registry().versions(line)] == [1], "nothing of it was registered"

    again = resolve(config)
    assert again.champion is not None and again.champion.content_id == drafters[0].content_id
    nodes = {node.name: node for node in refresh_nodes(again)}
    assert nodes["gate"].inputs["champion"] == nodes["evaluation"].inputs["champion"] == "champion"
    ended = RefreshCourse(again, ()).finish(made, None)
    assert ended is not None and ended.name == "Promoted"
    assert [(event.version, event.before) for event in registry().events(line)] == [(1, None), (2, 1)]


def test_the_champion_has_the_number_of_its_own_line(
    line: str, home: Path, drafters: list[ArtifactRef], tmp_path: Path
) -> None:
    """Two lines serve the same drafter: its artifact, and what was measured against it, are the same."""
    store, told = Store(home / "store"), tmp_path / "told.json"
    registry().register(line, gated(store, drafters[1])["gate"], {})
    config = config_of(line, on_promote={"command": [sys.executable, "-c", NOTE, str(told)]})
    RefreshCourse(resolve(config), ()).finish(gated(store, drafters[0]), None)
    resolved = resolve(config)
    (report,) = (node for node in refresh_nodes(resolved) if node.name == "report")
    assert report.config.key_material()["champion"] == [line, 2]
    third = gated(Store(tmp_path / "other" / "store"), drafters[1], champion="champion")
    ended = RefreshCourse(resolved, ()).finish(third, None)
    assert ended is not None and ended.message.startswith(
        f"{line} version 3 is the champion: promoted: opd beats version 2"
    )
    assert ended.tags["version"] == f"{line}@3"
    assert json.loads(told.read_text())["champion"] == "2"
    assert registry().version(line, 3).tags["decision"] == "promoted: opd beats version 2"


def test_what_was_rolled_back_is_not_promoted_again_by_itself(
    line: str, home: Path, drafters: list[ArtifactRef]
) -> None:
    """Nothing has changed since: the plan has the same keys, and all of it is reused."""
    store, config = Store(home / "store"), config_of(line)
    RefreshCourse(resolve(config), ()).finish(gated(store, drafters[0]), None)
    second = gated(store, drafters[1])
    RefreshCourse(resolve(config), ()).finish(second, None)
    commands.rollback(Display(), line, "it accepts nothing", dry_run=False)
    ended = RefreshCourse(resolve(config), ()).finish(second, None)
    assert ended is not None and ended.name == "Refused" and ended.error is not None
    assert "took it out of service" in ended.message and "(it accepts nothing)" in ended.message
    assert f"`draftsmith promote {line}@2`" in ended.message
    page = page_of(second)
    assert '<p class="badge">The gate says: promote</p>' in page and "SFT + OPD is to be the line" in page
    assert "Promoted" not in page, "what somebody may have undone"
    assert ended.tags["outcome"] == "refused"
    champion = registry().champion(line)
    assert champion is not None and champion.number == 1


@pytest.mark.parametrize("lost", [1, 2])
def test_a_hook_is_called_once_though_mlflow_is_lost_behind_it(
    lost: int, line: str, home: Path, drafters: list[ArtifactRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    config = config_of(line, on_promote={"command": ["sh", "-c", f"echo >> {calls}"]})
    course, made = RefreshCourse(resolve(config), ()), gated(Store(home / "store"), drafters[0])
    tag, times = Registry.tag, 0

    def losing(self: Registry, version: Version, tags: dict[str, str]) -> None:
        nonlocal times
        if tags.get("on_promote") == "called":
            times += 1
            if times <= lost:
                raise RetryableError("MLflow is away")
        tag(self, version, tags)

    monkeypatch.setattr(Registry, "tag", losing)
    for _ in range(lost):
        with pytest.raises(RetryableError):
            course.finish(made, None)
    ended = course.finish(made, None)
    assert ended is not None and ended.message.endswith("on_promote was called")
    assert calls.read_text() == "\n"
    assert registry().versions(line)[0].tags["on_promote"] == "called"


@pytest.mark.parametrize("code", [0, 1])
def test_a_hook_is_called_once_by_two_launchers_of_one_config(
    code: int, line: str, home: Path, drafters: list[ArtifactRef], tmp_path: Path
) -> None:
    """The second comes to its promotion while the first one's hook is at work."""
    calls = tmp_path / "calls"
    config = config_of(line, on_promote={"command": ["sh", "-c", f"sleep 1; echo >> {calls}; exit {code}"]})
    made, courses = gated(Store(home / "store"), drafters[0]), [RefreshCourse(resolve(config), ()) for _ in range(3)]
    ended: list[Conclusion | None] = []
    both = [
        threading.Thread(target=lambda course=each: ended.append(course.finish(made, None))) for each in courses[:2]
    ]
    for each in both:
        each.start()
    for each in both:
        each.join()
    ended.append(courses[2].finish(made, None))  # one that was slower yet
    told = {each.message.rpartition("; ")[2] for each in ended if each is not None}
    assert (len(ended), calls.read_text()) == (3, "\n")
    assert told == {"on_promote was called" if code == 0 else "on_promote failed: sh: ended with code 1 (no message)"}
    assert registry().versions(line)[0].tags["on_promote"].startswith("failed: sh" if code else "called")


def test_an_older_version_that_was_promoted_by_hand_stays(line: str, home: Path, drafters: list[ArtifactRef]) -> None:
    store, config = Store(home / "store"), config_of(line)
    RefreshCourse(resolve(config), ()).finish(gated(store, drafters[0]), None)
    second = gated(store, drafters[1])
    RefreshCourse(resolve(config), ()).finish(second, None)
    commands.promote(Display(), f"{line}@1", "accepts nothing", dry_run=False)
    ended = RefreshCourse(resolve(config), ()).finish(second, None)
    assert ended is not None and ended.name == "Refused" and ended.overrules
    commands.promote(Display(), f"{line}@2", "it was the server", dry_run=False)
    ended = RefreshCourse(resolve(config), ()).finish(second, None)
    assert ended is not None and ended.name == "Promoted"


def test_a_refusal_of_what_another_refresh_promoted_leaves_its_record(
    line: str, home: Path, drafters: list[ArtifactRef], tmp_path: Path
) -> None:
    """Two homes have made the same drafter, and measured it each for itself."""
    slow = RefreshCourse(resolve(config_of(line)), ())
    RefreshCourse(resolve(config_of(line)), ()).finish(gated(Store(home / "store"), drafters[0]), None)
    other = gated(Store(tmp_path / "other" / "store"), drafters[0], "refused")
    with pytest.raises(OutdatedPlanError):
        slow.finish(other, None)
    (version,) = registry().versions(line)
    assert version.tags["decision"] == "promoted: why" and version.aliases == ("champion",)


def test_a_refusal_of_the_champions_own_content_leaves_its_record(
    line: str, home: Path, drafters: list[ArtifactRef], tmp_path: Path
) -> None:
    """`registry.restart` has made it again: it is measured against itself."""
    store, config = Store(home / "store"), config_of(line)
    RefreshCourse(resolve(config), ()).finish(gated(store, drafters[0]), None)
    again = gated(Store(tmp_path / "other" / "store"), drafters[0], "refused", tau=1.5)
    ended = RefreshCourse(resolve(config), ()).finish(again, None)
    assert ended is not None and ended.name == "Refused"
    (version,) = registry().versions(line)
    assert (version.tags["decision"], version.tags["tau"]) == ("promoted: why", "2.5000")
    assert version.figures()["all"]["tau"] == 2.5 and version.aliases == ("champion",)
    client, _ = Tracking(home).connect()
    assert client.get_model_version(line, "1").description == "promoted: why"

    RefreshCourse(resolve(config), ()).finish(gated(store, drafters[1]), None)
    back = gated(Store(tmp_path / "third" / "store"), drafters[0], tau=3.5)
    RefreshCourse(resolve(config), ()).finish(back, None)
    champion = registry().champion(line)
    assert champion is not None
    assert (champion.number, champion.tags["tau"]) == (1, "3.5000"), "promoted once more: what it is worth by now"


def test_a_version_that_does_not_come_back_after_all_keeps_its_record(
    line: str, home: Path, drafters: list[ArtifactRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = Store(home / "store"), config_of(line, on_promote={"command": ["true"]})
    for drafter in drafters:
        RefreshCourse(resolve(config), ()).finish(gated(store, drafter), None)
    slow, ask = RefreshCourse(resolve(config), ()), Registry.rolled_back

    def moved(self: Registry, version: Version) -> object:
        other = self.register(line, committed(store, "opd", "c", lambda out: (out / "x").write_text("x")), {})
        self.promote(other, expected=self.champion(line), why="another was faster")
        return ask(self, version)

    monkeypatch.setattr(Registry, "rolled_back", moved)
    with pytest.raises(OutdatedPlanError, match="version 3 is the champion by now"):
        slow.finish(gated(Store(tmp_path / "other" / "store"), drafters[0], tau=3.5), None)
    tags = registry().version(line, 1).tags
    assert (tags["tau"], tags["on_promote"]) == ("2.5000", "called"), "those of its promotion"


def test_a_hook_that_a_lost_run_owes_is_called_by_the_next(
    line: str, home: Path, drafters: list[ArtifactRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told.json"
    config = config_of(line, on_promote={"command": [sys.executable, "-c", NOTE, str(told)]})
    made = gated(Store(home / "store"), drafters[0])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("draftsmith.flows.refresh.hook.call", interrupted)
        RefreshCourse(resolve(config), ()).finish(made, None)
    assert registry().champion(line) is not None and not told.exists()
    assert RefreshCourse(resolve(config), ()).stop(*checked(resolve(config), home)) is not None
    decision = json.loads((made["gate"].path / DECISION).read_text())
    assert json.loads(told.read_text()).items() >= {**decision, "line": line, "version": 1}.items()
    told.unlink()
    assert RefreshCourse(resolve(config), ()).stop(*checked(resolve(config), home)) is not None
    assert not told.exists(), "once"


def interrupted(*_arguments: object) -> None:
    raise KeyboardInterrupt


def test_drafters_are_compared_by_folder_id_and_version(
    line: str, home: Path, drafters: list[ArtifactRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    RefreshCourse(resolve(config_of(line)), ()).finish(gated(Store(home / "store"), drafters[0]), None)
    named = [str(drafters[1].path), f"{line}@champion", "z-lab/Qwen3-4B-DFlash-b16"]
    config = evaluate_config(resolve(config_of(line)), named)
    name = drafters[1].path.name
    assert config.drafters == {
        name: str(drafters[1].path / DRAFTER_FOLDER),
        f"{line}@champion": str(drafters[0].path / DRAFTER_FOLDER),
        "z-lab-Qwen3-4B-DFlash-b16": "z-lab/Qwen3-4B-DFlash-b16",
    }
    nodes = {node.name: node for node in evaluate_nodes(config)}
    assert {f"drafter:{arm}": arm for arm in config.drafters}.items() <= nodes["evaluation"].inputs.items()
    assert all(nodes[arm].config.model_dump()["steps"] == 0 for arm in config.drafters)
    (drafters[0].path / DRAFTER_FOLDER / "config.json").chmod(0o600)
    (drafters[0].path / DRAFTER_FOLDER / "config.json").write_text("{}")
    with pytest.raises(DraftsmithError, match=r"config\.json"):
        evaluate_config(resolve(config_of(line)), [f"{line}@1"])
    for taken in ("control", "plain", "plain-2"):  # a name would change what is compared with what
        shutil.copytree(drafters[1].path / DRAFTER_FOLDER, home / taken)
    own = evaluate_config(resolve(config_of(line)), [str(home / "control"), str(home / "plain")])
    assert list(own.drafters) == ["control-1", "plain-2"]
    own = evaluate_config(resolve(config_of(line)), [str(home / "plain-2"), str(home / "plain")])
    assert list(own.drafters.values()) == [str(home / "plain-2"), str(home / "plain")], "none takes another's name"
    (home / "made").mkdir()
    monkeypatch.chdir(home)
    for gone in ("./nowhere", "nowhere", "made/nowhere", "some/other/nowhere"):
        with pytest.raises(DraftsmithError, match=f"{gone}: no such folder"):
            evaluate_config(resolve(config_of(line)), [gone])


def test_a_version_is_found_in_a_home_that_was_moved_and_where_its_key_was_made_again(
    line: str, home: Path, drafters: list[ArtifactRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    RefreshCourse(resolve(config_of(line)), ()).finish(gated(Store(home / "store"), drafters[0]), None)
    moved = home.rename(home.with_name("elsewhere"))
    monkeypatch.setenv("DRAFTSMITH_HOME", str(moved))
    version = registry().resolve(line)
    place = Store(moved / "store").path(version.stage, version.key)
    assert folder_of(version) == place and checkpoint_of(version) == place / DRAFTER_FOLDER
    assert commands.verified(version) == place / DRAFTER_FOLDER
    aside = place.rename(place.with_name(f"{REPLACED}{place.name}-1"))
    assert folder_of(version) == aside
    os.utime(aside, (0, 0))
    for path in aside.rglob("*"):
        os.utime(path, (0, 0))
    assert [each.path for each in leftovers(moved, 1.0)] == [aside]
    prune(Display(), 1, artifacts=False, delete=True)
    assert aside.exists(), "the champion's only copy"
    shutil.copytree(aside, place)
    (place / MANIFEST).chmod(0o600)
    (place / MANIFEST).write_text("{")
    assert folder_of(version) == aside and resolve(config_of(line)).registry is not None, "a damaged one is none"


def test_a_version_of_a_bucket_is_fetched_where_its_manifest_alone_is_known(
    line: str, home: Path, drafters: list[ArtifactRef], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORE, f"file://{tmp_path}/bucket")
    made = committed(store_of(home), "opd", "c", lambda out: shutil.copytree(drafters[0].path, out, dirs_exist_ok=True))
    registry().register(line, made, {})
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "other"))
    other = store_of(tmp_path / "other")
    assert other.find("opd", made.key) is not None, "which keeps the manifest"
    assert not (other.path("opd", made.key) / DRAFTER_FOLDER).exists()
    (version,) = registry().versions(line)
    uploaded = dataclasses.replace(version, tags={**version.tags, "uploaded": "runs:/a/drafter"})
    assert uploaded.uploaded and checkpoint_of(uploaded) == other.path("opd", made.key) / DRAFTER_FOLDER
    assert not checkpoint_of(uploaded).exists(), "to plan fetches no weights"
    assert (folder_of(version) / DRAFTER_FOLDER / "config.json").is_file()
    assert commands.verified(version) == other.path("opd", made.key) / DRAFTER_FOLDER
