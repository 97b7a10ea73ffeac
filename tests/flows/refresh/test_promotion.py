"""From the gate's decision to the registry: promotion, refusal, approval, a changed champion."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.local import REPLACED, Store
from draftsmith.artifacts.store.manifest import MANIFEST, Artifact
from draftsmith.artifacts.store.mirror import STORE_VARIABLE, open_store
from draftsmith.artifacts.store.retention import leftovers
from draftsmith.artifacts.tracking.registry import PREVIOUS
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.cli.commands import prune
from draftsmith.flows.cli.main import main
from draftsmith.flows.execution.display import Display
from draftsmith.flows.planning.plan import OutdatedPlanError
from draftsmith.flows.refresh import registry_commands
from draftsmith.flows.refresh.champion import resolve
from draftsmith.flows.refresh.flow import promote
from draftsmith.flows.refresh.graph import refresh_nodes
from draftsmith.flows.refresh.measurements import evaluate_config, evaluate_nodes
from draftsmith.flows.refresh.swap import served_by
from draftsmith.flows.refresh.versions import artifact_folder, drafter_checkpoint, registry
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.servers.requirements import served_block_size
from draftsmith.stages.engines.sglang.protocol import SWAP_STATE
from tests.flows.refresh.line_runs import checked, config_of, finished, folders_of, gated, page_of, serving
from tests.stages.engines.http_server import answer
from tests.stages.engines.http_server import serving as http_server
from tests.testbed.artifacts import committed


def test_a_promotion_moves_the_alias(line: str, home: Path, drafters: list[Artifact]) -> None:
    store, config = Store(home / "store"), config_of(line)
    ended = finished(config, gated(store, drafters[0]))
    assert (ended.name, ended.error) == ("Promoted", None)
    champion = registry().champion(line)
    assert champion is not None and champion.content_id == drafters[0].content_id
    metrics = champion.metrics()
    assert metrics["all"] == {
        "tau": 2.5, "low": 2.4, "high": 2.6, "prompts": 40, "speedup": 1.2, "speedup_low": 1.15, "speedup_high": 1.25,
    }  # fmt: skip
    assert metrics["chat"]["speedup_high"] == 1.3 and metrics["chat"]["low"] == 2.4

    ended = finished(config, gated(store, drafters[1]))
    assert ended.name == "Promoted" and ended.error is None
    champion, before = registry().champion(line), registry().alias(line, PREVIOUS)
    assert champion is not None and before is not None
    assert (champion.number, before.number) == (2, 1)


@pytest.mark.parametrize(("outcome", "state"), [("refused", "Refused"), ("inconclusive", "Inconclusive")])
def test_a_challenger_that_is_not_promoted_becomes_a_version_but_no_champion(
    outcome: str, state: str, line: str, home: Path, drafters: list[Artifact]
) -> None:
    ended = finished(config_of(line), gated(Store(home / "store"), drafters[0], outcome))
    assert ended.name == state
    assert ended.error is not None and ended.error.exit_code == 3
    assert serving(line) is None
    (version,) = registry().versions(line)
    assert version.tags["decision"] == f"{outcome}: why" and version.aliases == ("challenger",)
    kind = {"refused": "broken", "inconclusive": "inconclusive"}[outcome]
    assert version.tags["rules"] == ended.tags["rules"] == f"{kind}: speed-up"
    assert len(ended.tags) <= 5 and "no champion" in description(home, line)


def test_a_challenger_that_needs_approval_waits_until_a_person_promotes_it(
    line: str, home: Path, drafters: list[Artifact]
) -> None:
    config, made = config_of(line, registry={"name": line, "approve": True}), gated(Store(home / "store"), drafters[0])
    ended = finished(config, made)
    assert (ended.name, ended.overrules_review, ended.asset) == ("Waiting", True, "")
    assert ended.error is not None and ended.error.exit_code == 3
    assert serving(line) is None and f"`draftsmith promote {line}@1`" in ended.message
    registry_commands.promote(Display(), f"{line}@1", "", dry_run=False)
    ended = finished(config, made)
    assert ended.name == "Promoted"
    assert ended.asset == f"draftsmith://line/{line}/champion"
    assert ended.metadata.items() >= {"version": 1, "tau": 2.5}.items()


def test_a_promotion_swaps_the_servers_and_a_failed_swap_is_an_outcome_and_undoes_nothing(
    line: str, home: Path, drafters: list[Artifact]
) -> None:
    checkpoint = drafters[0].path / DRAFTER_FOLDER
    since = "2026-11-30T08:00:00+00:00"
    state = {"drafter": drafter_digest(checkpoint), "since": since, "before": "", "pause_s": 0.0}
    block = served_block_size(checkpoint, DraftingConfig(), "DFLASH")
    info = {"speculative_algorithm": "DFLASH", "speculative_num_draft_tokens": block}
    states: list[dict[str, Any]] = [{SWAP_STATE: state}]
    with http_server(answer, server_info=lambda _: {**info, "internal_states": states}) as server:
        registry_config = {"name": line, "servers": [server.url]}
        config = config_of(line, registry=registry_config)
        started = config_of(line, registry={**registry_config, "restart": True})
        ended = finished(started, gated(Store(home / "store"), drafters[0]))
        assert (ended.name, ended.error) == ("Promoted", None)
        assert f"{server.url} drafts with {line} version 1 since {since}." in ended.message
        (served,) = served_by(registry().version(line, 1))
        assert (served.url, served.since) == (server.url, since), "by its own report"

        states[0] = {}  # it was started again without the plug-in
        ended = finished(config, gated(Store(home / "store"), drafters[1]))
        assert (ended.name, ended.tags["outcome"], serving(line)) == ("Unserved", "promoted", 2)
        assert ended.error is not None and ended.error.exit_code == 2 and server.url in str(ended.error)
        assert ended.asset and ended.overrules_review
        current = checked(resolve(config), home)
        assert current is not None and (current.name, current.tags["outcome"]) == ("Unserved", "current")

        with pytest.raises(DraftsmithError, match=f"run `draftsmith swap {line}`"):
            registry_commands.rollback(Display(), line, "", dry_run=False)
        assert serving(line) == 1
    current = checked(resolve(config), home)
    assert current is not None and current.error is not None and current.error.exit_code == 75, "the server is down"


def description(home: Path, line: str) -> str:
    """Return the description of the registered model."""
    return str(Tracking(home).connect()[0].get_registered_model(line).description)


def test_the_slower_of_two_refreshes_must_plan_again_against_the_new_champion(
    line: str, home: Path, drafters: list[Artifact]
) -> None:
    store, config = Store(home / "store"), config_of(line)
    slow = resolve(config)
    finished(config, gated(store, drafters[0]))
    made = gated(store, drafters[1])
    with pytest.raises(OutdatedPlanError, match="version 1 is now the champion"):
        promote(slow, folders_of(made), None)
    assert [version.number for version in registry().versions(line)] == [1], "the challenger was not registered"

    again = resolve(config)
    assert again.champion is not None and again.champion.content_id == drafters[0].content_id
    nodes = {node.name: node for node in refresh_nodes(again)}
    assert nodes["gate"].inputs["champion"] == nodes["evaluation"].inputs["champion"] == "champion"
    ended = finished(again, made)
    assert ended.name == "Promoted"
    assert [(event.version, event.before) for event in registry().events(line)] == [(1, None), (2, 1)]


def test_the_decision_names_the_champions_version_in_its_line(
    line: str, home: Path, drafters: list[Artifact], tmp_path: Path
) -> None:
    """Two lines may serve the same drafter, so that evaluation and gate are the same artifacts."""
    store, config = Store(home / "store"), config_of(line)
    registry().register(line, gated(store, drafters[1])["gate"], {})
    finished(config, gated(store, drafters[0]))
    resolved = resolve(config)
    (report,) = (node for node in refresh_nodes(resolved) if node.name == "report")
    assert report.config.key_material()["champion"] == [line, 2]
    third = gated(Store(tmp_path / "other" / "store"), drafters[1], champion="champion")
    ended = finished(resolved, third)
    assert ended.message.startswith(f"{line} version 3 is the champion: promoted: opd beats version 2")
    assert ended.tags["version"] == f"{line}@3"
    assert registry().version(line, 3).tags["decision"] == "promoted: opd beats version 2"


def test_champions_without_a_name_lists_the_lines(
    line: str, home: Path, drafters: list[Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    made = gated(Store(home / "store"), drafters[0])
    finished(config_of(line), made)
    registry().register("without-champion", made["gate"], {})
    Tracking(home).connect()[0].create_registered_model("somebody's model")
    assert main(["champions"]) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    tau = registry().version(line, 1).tags["tau"]
    assert [line, "1", tau] in rows and ["without-champion", "-", "-"] in rows


def test_a_version_that_was_rolled_back_is_not_promoted_again(line: str, home: Path, drafters: list[Artifact]) -> None:
    """The inputs are unchanged, so the plan has the same keys and reuses everything."""
    store, config = Store(home / "store"), config_of(line)
    finished(config, gated(store, drafters[0]))
    second = gated(store, drafters[1])
    finished(config, second)
    registry_commands.rollback(Display(), line, "it accepts nothing", dry_run=False)
    ended = finished(config, second)
    assert ended.name == "Refused" and ended.error is not None
    assert "took it out of service" in ended.message and "(it accepts nothing)" in ended.message
    assert f"`draftsmith promote {line}@2`" in ended.message
    page = page_of(second)
    assert '<p class="badge">The gate says: promote</p>' in page and "SFT + OPD is to be the line" in page
    assert "Promoted" not in page, "somebody may undo it"
    assert ended.tags["outcome"] == "refused"
    assert serving(line) == 1


def test_refusing_the_champions_own_content_does_not_change_its_tags(
    line: str, home: Path, drafters: list[Artifact], tmp_path: Path
) -> None:
    """`registry.restart` has made the same drafter again."""
    store, config = Store(home / "store"), config_of(line)
    finished(config, gated(store, drafters[0]))
    again = gated(Store(tmp_path / "other" / "store"), drafters[0], "refused", tau=1.5)
    ended = finished(config, again)
    assert ended.name == "Refused"
    (version,) = registry().versions(line)
    assert (version.tags["decision"], version.tags["tau"]) == ("promoted: why", "2.5000")
    assert version.metrics()["all"]["tau"] == 2.5 and version.aliases == ("champion",)
    client, _ = Tracking(home).connect()
    assert client.get_model_version(line, "1").description == "promoted: why"

    finished(config, gated(store, drafters[1]))
    back = gated(Store(tmp_path / "third" / "store"), drafters[0], tau=3.5)
    finished(config, back)
    champion = registry().champion(line)
    assert champion is not None
    assert (champion.number, champion.tags["tau"]) == (1, "3.5000"), "promoted again, with its new metrics"


def test_evaluate_takes_folders_hub_ids_and_versions(
    line: str, home: Path, drafters: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(config_of(line), gated(Store(home / "store"), drafters[0]))
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
    shutil.copytree(drafters[1].path / DRAFTER_FOLDER, home / "control")
    own = evaluate_config(resolve(config_of(line)), [str(home / "control")])
    assert list(own.drafters) == ["control-1"], "`control` is reserved for a refresh's arm"
    monkeypatch.chdir(home)
    for gone in ("./nowhere", "some/other/nowhere"):
        with pytest.raises(DraftsmithError, match=f"{gone}: no such folder"):
            evaluate_config(resolve(config_of(line)), [gone])


def test_a_version_is_found_in_a_moved_home_and_after_its_key_was_made_again(
    line: str, home: Path, drafters: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(config_of(line), gated(Store(home / "store"), drafters[0]))
    moved = home.rename(home.with_name("elsewhere"))
    monkeypatch.setenv("DRAFTSMITH_HOME", str(moved))
    version = registry().resolve(line)
    place = Store(moved / "store").path(version.stage, version.key)
    assert artifact_folder(version) == place and drafter_checkpoint(version) == place / DRAFTER_FOLDER
    assert registry_commands.verify_checkpoint(version) == place / DRAFTER_FOLDER
    replaced = place.rename(place.with_name(f"{REPLACED}{place.name}-1"))
    assert artifact_folder(version) == replaced
    os.utime(replaced, (0, 0))
    for path in replaced.rglob("*"):
        os.utime(path, (0, 0))
    assert [each.path for each in leftovers(moved, 1.0)] == [replaced]
    prune(Display(), 1, artifacts=False, delete=True)
    assert replaced.exists(), "the champion's only copy"
    shutil.copytree(replaced, place)
    (place / MANIFEST).chmod(0o600)
    (place / MANIFEST).write_text("{")
    assert artifact_folder(version) == replaced and resolve(config_of(line)).registry is not None, (
        "the damaged one is ignored"
    )


def test_a_version_in_a_bucket_is_fetched_only_when_its_files_are_needed(
    line: str, home: Path, drafters: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORE_VARIABLE, f"file://{tmp_path}/bucket")
    made = committed(
        open_store(home), "opd", lambda out: shutil.copytree(drafters[0].path, out, dirs_exist_ok=True), "c"
    )
    registry().register(line, made, {})
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "other"))
    other = open_store(tmp_path / "other")
    assert other.find("opd", made.key) is not None, "this home has only the manifest"
    assert not (other.path("opd", made.key) / DRAFTER_FOLDER).exists()
    (version,) = registry().versions(line)
    uploaded = dataclasses.replace(version, tags={**version.tags, "uploaded": "runs:/a/drafter"})
    assert uploaded.uploaded and drafter_checkpoint(uploaded) == other.path("opd", made.key) / DRAFTER_FOLDER
    assert not drafter_checkpoint(uploaded).exists(), "planning fetches no weights"
    assert (artifact_folder(version) / DRAFTER_FOLDER / "config.json").is_file()
    assert registry_commands.verify_checkpoint(version) == other.path("opd", made.key) / DRAFTER_FOLDER
