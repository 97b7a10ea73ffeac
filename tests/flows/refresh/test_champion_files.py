"""A champion whose files are damaged, or that only MLflow or another MLflow has."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.tracking.refresh_runs import RefreshRun
from draftsmith.artifacts.tracking.registry import note_tracker
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.cli import commands
from draftsmith.flows.cli.main import parser
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh import registry_commands
from draftsmith.flows.refresh.champion import resolve, restarted
from draftsmith.flows.refresh.graph import REFRESH
from draftsmith.flows.refresh.versions import download_upload, registry
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.champion import STAGE as CHAMPION
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.servers import drafter_files
from draftsmith.stages.engines.servers.drafter_files import WantedDrafter, read_drafter
from tests.flows.refresh.line_runs import config_of, finished, gated, serving
from tests.testbed.context import RecordingContext


def test_an_uploaded_champion_is_used_without_the_store(
    line: str,
    home: Path,
    drafters: list[Artifact],
    plain_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refresh = RefreshRun(Tracking(home), "week 1", {})
    run_id = refresh.open()
    config = config_of(line, registry={"name": line, "upload": True})
    finished(config, gated(Store(home / "store"), drafters[0]), run_id)
    refresh.close("FINISHED")
    digest = drafter_digest(drafters[0].path / DRAFTER_FOLDER)
    shutil.rmtree(home / "store")  # as on a machine that only has MLflow
    upload, gone = registry().version(line, 1).uploaded, str(home / "store")
    wanted = WantedDrafter(digest, gone, upload)
    assert "model.safetensors" in read_drafter(wanted), "as a server reads it"
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=f"{upload} is too large"):
        patched.setattr(drafter_files, "MOST_BYTES", 1000)
        read_drafter(wanted)

    champion = resolve(config).champion
    assert champion is not None and Path(champion.folder).is_relative_to(home / "uploaded")
    os.utime(copy := Path(champion.folder).parent, (0, 0))
    assert resolve(config).champion == champion and copy.stat().st_mtime > 0, "`prune` keeps what was used recently"
    taken = RecordingContext.under(tmp_path / "taken", {"target": plain_artifact})
    CHAMPION.run(taken, champion)
    assert drafter_digest(taken.out / DRAFTER_FOLDER) == digest
    registry_commands.export(Display(), line, tmp_path / "exported")
    assert drafter_digest(tmp_path / "exported") == digest
    with pytest.raises(DraftsmithError, match="which names the target, is not here"):
        registry_commands.export(Display(), line, tmp_path / "vllm", "speculators")

    weights = Path(champion.folder) / "model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(b"other")
    with pytest.raises(DraftsmithError, match="is not what was registered"):
        registry_commands.export(Display(), line, tmp_path / "again")
    registry_commands.export(Display(), line, tmp_path / "again")


def test_adapters_that_an_earlier_release_uploaded_are_no_upload(
    line: str, home: Path, drafters: list[Artifact], plain_artifact: Path, tmp_path: Path
) -> None:
    """Their store is needed. Without it the champion is neither missing nor another one, and can be replaced."""
    refresh = RefreshRun(Tracking(home), "week 1", {})
    config = config_of(line, registry={"name": line, "upload": True})
    made, run_id = gated(Store(home / "store"), drafters[0]), refresh.open()
    finished(config, made, run_id)
    address = registry().version(line, 1).uploaded
    earlier = {"uploaded": f"{address} {address}", "base": "a" * 64}
    registry().tag(registry().version(line, 1), earlier)
    assert registry().version(line, 1).uploaded == ""
    registry_commands.export(Display(), line, tmp_path / "with the store")
    (home / "store").rename(tmp_path / "elsewhere")
    champion = resolve(config).champion
    assert champion is not None
    with pytest.raises(DraftsmithError, match=rf"{line} version 1: its folder .* is missing\. Mount .* whole"):
        CHAMPION.run(RecordingContext.under(tmp_path / "taken", {"target": plain_artifact}), champion)
    with pytest.raises(DraftsmithError, match=rf"{line} version 1: its artifact .* is not here\. Mount the store"):
        registry_commands.export(Display(), line, tmp_path / "without")
    (tmp_path / "elsewhere").rename(home / "store")
    finished(config, made, run_id)
    assert registry().version(line, 1).uploaded == address, "its refresh uploads it whole"
    refresh.close("FINISHED")


@pytest.mark.parametrize("upload", [True, False])
def test_a_damaged_drafter_is_replaced_by_its_upload_or_is_an_error(
    upload: bool, line: str, home: Path, drafters: list[Artifact], plain_artifact: Path, tmp_path: Path
) -> None:
    """For a rollback, whose error must not advise `--force`, and for the next refresh."""
    config = config_of(line, registry={"name": line, "upload": upload})
    digest = drafter_digest(drafters[0].path / DRAFTER_FOLDER)
    for drafter in drafters:
        made = gated(Store(home / "store"), drafter)
        refresh = RefreshRun(Tracking(home), "weekly", {})
        finished(config, made, refresh.open())
        refresh.close("FINISHED")
    weights = drafters[0].path / DRAFTER_FOLDER / "model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(b"other")
    if upload:
        registry_commands.rollback(Display(), line, "it accepts nothing", dry_run=False)
        registry_commands.export(Display(), line, tmp_path / "copy")
        assert drafter_digest(tmp_path / "copy") == digest
        taken = RecordingContext.under(tmp_path / "taken", {"target": plain_artifact})
        champion = resolve(config).champion
        assert champion is not None
        CHAMPION.run(taken, champion)
        assert drafter_digest(taken.out / DRAFTER_FOLDER) == digest
    else:
        with pytest.raises(DraftsmithError, match=r"version 1: .*model\.safetensors: .*promote") as error:
            registry_commands.rollback(Display(), line, "it accepts nothing", dry_run=False)
        assert "--force" not in str(error.value)
    assert serving(line) == (1 if upload else 2)


def test_a_line_that_another_mlflow_has_is_an_error(
    line: str, home: Path, drafters: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for the same command in a shell that lacks the schedule's MLFLOW_TRACKING_URI."""
    note_tracker(Tracking(home))
    finished(config_of(line), gated(Store(home / "store"), drafters[0]))
    assert resolve(config_of("another")).champion is None, "a new line may start beside others"
    with monkeypatch.context() as forgotten:
        forgotten.delenv("MLFLOW_TRACKING_URI")
        wanted = rf"^{line}: it has no version here; .* in sqlite:.*, none in mlflow\.db\. Set MLFLOW_TRACKING_URI as"
        with pytest.raises(DraftsmithError, match=wanted):
            resolve(config_of(line))
        assert resolve(config_of(line, registry={"name": line, "restart": True})).champion is None
    assert resolve(config_of(line)).champion is not None


def test_no_tag_leads_out_of_the_home(line: str, home: Path, drafters: list[Artifact], tmp_path: Path) -> None:
    """An exported drafter lies next to the home, where the folder of a digest `../..` would be."""
    refresh = RefreshRun(Tracking(home), "week 1", {})
    config = config_of(line, registry={"name": line, "upload": True})
    finished(config, gated(Store(home / "store"), drafters[0]), refresh.open())
    refresh.close("FINISHED")
    registry_commands.export(Display(), line, home.parent / DRAFTER_FOLDER)
    shutil.rmtree(home / "store")  # as on a machine that only has MLflow

    def outside() -> dict[Path, bytes]:
        files = (path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(home))
        return {path: path.read_bytes() for path in files}

    uses: list[Callable[[], object]] = [
        lambda: resolve(config),
        lambda: download_upload(version),
        lambda: registry_commands.export(Display(), line, tmp_path / "again"),
    ]
    client, version, before = Tracking(home).connect()[0], registry().version(line, 1), outside()
    record = json.loads(client.get_model_version(line, "1").tags["draftsmith.version_record"])
    assert home.parent / DRAFTER_FOLDER / "model.safetensors" in before

    def write(tags: dict[str, str]) -> None:
        for tag, value in tags.items():
            client.set_model_version_tag(line, "1", f"draftsmith.{tag}", value)

    for tag, others in (
        ("drafter_digest", {"version_record": json.dumps(record)}),
        ("key", {"key": version.key}),
        ("stage", {"stage": "opd"}),
    ):
        write({"version_record": json.dumps(record | {tag: "../.."})} if tag in record else {tag: "../.."})
        version = dataclasses.replace(version, tags={**version.tags, "drafter_digest": "../.."})
        for use in uses:
            with pytest.raises(DraftsmithError, match=rf"^{line} version 1: tag draftsmith\.\w+: '\.\./\.\.' is not a"):
                use()
        assert outside() == before
        write(others)
    del record["drafter_digest"]
    write({"version_record": json.dumps(record)})
    with pytest.raises(DraftsmithError, match=r"tag draftsmith\.drafter_digest: nothing is not a sha256 digest"):
        registry_commands.export(Display(), line, tmp_path / "again")


def test_a_line_with_servers_starts_without_a_champion_only_by_the_option(
    line: str, home: Path, drafters: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new host whose shell lacks MLFLOW_TRACKING_URI has the config, and no champion."""
    config = config_of(line, registry={"name": line, "servers": ["http://gpu1:30000"]})
    finished(config_of(line), gated(Store(home / "store"), drafters[0]))
    assert resolve(config).champion is not None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("DRAFTSMITH_HOME", str(home.parent / "new"))
    with pytest.raises(DraftsmithError, match=rf"^{line}: .*no champion in sqlite:.*servers.* --restart"):
        resolve(config)
    given = {"name": "weekly", "target": {"source": "nowhere"}, "logs": {"paths": ["answers.jsonl"], "temperature": 0}}
    (file := home.parent / "weekly.yaml").write_text(
        json.dumps({**given, "registry": {"name": line, "servers": ["http://gpu1:30000"]}})
    )
    read = commands._read_config(parser().parse_args(["run", str(file), "--restart"]), REFRESH)
    assert read == resolve(restarted(config)) and read.champion is None
    assert resolve(config_of(line)).champion is None, "without servers a new line starts by itself"


def test_a_restart_does_not_begin_with_the_champion(line: str, home: Path, drafters: list[Artifact]) -> None:
    config = config_of(line, sft={"init_from": "champion"})
    assert resolve(restarted(config)).champion is None, "there is none yet"
    finished(config, gated(Store(home / "store"), drafters[0]))
    with pytest.raises(DraftsmithError, match=r"--restart contradicts sft\.init_from `champion`, .*version 1"):
        resolve(restarted(config))
    with pytest.raises(DraftsmithError, match="--restart: the config names no model line"):
        restarted(config.model_copy(update={"registry": None}))
