"""A champion whose files are damaged, or that only MLflow or another MLflow has."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import ArtifactRef
from draftsmith.artifacts.tracking.registry import note_tracker
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh import registry_commands
from draftsmith.flows.refresh.decisions import resolve
from draftsmith.flows.refresh.line import registry
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.stage import STAGE as CHAMPION
from draftsmith.stages.engines.servers.drafter_files import read_drafter
from tests.flows.refresh.line_runs import config_of, finished, gated, serving
from tests.testbed.context import RecordingContext


def test_an_uploaded_champion_is_used_without_the_store(
    line: str, home: Path, drafters: list[ArtifactRef], plain_artifact: Path, tmp_path: Path
) -> None:
    tracking = Tracking(home)
    run_id = tracking.open_refresh("week 1", {})
    config = config_of(line, registry={"name": line, "upload": True})
    finished(config, gated(Store(home / "store"), drafters[0]), run_id)
    tracking.close_refresh("FINISHED")
    digest = drafter_digest(drafters[0].path / DRAFTER_FOLDER)
    shutil.rmtree(home / "store")  # as on a machine that only has MLflow
    upload, gone = registry().version(line, 1).uploaded, str(home / "store")
    wanted = {"drafter": digest, "folder": gone, "upload": upload, "tracking": tracking.uri}
    assert "model.safetensors" in read_drafter(wanted), "as a server reads it"

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


@pytest.mark.parametrize("upload", [True, False])
def test_a_damaged_drafter_is_replaced_by_its_upload_or_is_an_error(
    upload: bool, line: str, home: Path, drafters: list[ArtifactRef], plain_artifact: Path, tmp_path: Path
) -> None:
    """For a rollback, whose error must not advise `--force`, and for the next refresh."""
    tracking = Tracking(home)
    config = config_of(line, registry={"name": line, "upload": upload})
    digest = drafter_digest(drafters[0].path / DRAFTER_FOLDER)
    for drafter in drafters:
        made = gated(Store(home / "store"), drafter)
        finished(config, made, tracking.open_refresh("weekly", {}))
        tracking.close_refresh("FINISHED")
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
    line: str, home: Path, drafters: list[ArtifactRef], monkeypatch: pytest.MonkeyPatch
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
