"""A champion whose files are damaged or elsewhere: what serves then, and what is said where nothing can."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import ArtifactRef
from draftsmith.artifacts.tracking import registry_homes as registered
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh import registry_commands
from draftsmith.flows.refresh.decisions import resolve
from draftsmith.stages.data.load import DRAFTER_FOLDER
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.stage import STAGE as CHAMPION
from tests.flows.refresh.made import config_of, finished, gated, serving
from tests.testbed.context import RecordingContext


def test_an_uploaded_champion_serves_where_the_store_is_not(
    line: str, home: Path, drafters: list[ArtifactRef], plain_artifact: Path, tmp_path: Path
) -> None:
    tracking = Tracking(home)
    run_id = tracking.open_refresh("week 1", {})
    config = config_of(line, registry={"name": line, "upload": True})
    finished(config, gated(Store(home / "store"), drafters[0]), run_id)
    tracking.close_refresh("FINISHED")
    digest = drafter_digest(drafters[0].path / DRAFTER_FOLDER)
    shutil.rmtree(home / "store")  # as on a machine that has MLflow alone

    champion = resolve(config).champion
    assert champion is not None and Path(champion.folder).is_relative_to(home / "uploaded")
    os.utime(copy := Path(champion.folder).parent, (0, 0))
    assert resolve(config).champion == champion and copy.stat().st_mtime > 0, "in use: `prune` leaves it"
    taken = RecordingContext.under(tmp_path / "taken", {"target": plain_artifact})
    CHAMPION.run(taken, champion)
    assert drafter_digest(taken.out / DRAFTER_FOLDER) == digest
    registry_commands.export(Display(), line, tmp_path / "exported", dry_run=False)
    assert drafter_digest(tmp_path / "exported") == digest
    with pytest.raises(DraftsmithError, match="which names the target, is not here: mount the store"):
        registry_commands.export(Display(), line, tmp_path / "vllm", "speculators", dry_run=False)

    weights = Path(champion.folder) / "model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(b"other")
    with pytest.raises(DraftsmithError, match="is not what was registered: run the same command again"):
        registry_commands.export(Display(), line, tmp_path / "again", dry_run=False)
    registry_commands.export(Display(), line, tmp_path / "again", dry_run=False)


@pytest.mark.parametrize("upload", [True, False])
def test_a_damaged_drafter_comes_back_where_there_is_a_copy_and_else_is_named(
    upload: bool, line: str, home: Path, drafters: list[ArtifactRef], plain_artifact: Path, tmp_path: Path
) -> None:
    """By a rollback, which has no `--force` that would make it again, and by the next refresh."""
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
        registry_commands.export(Display(), line, tmp_path / "copy", dry_run=False)
        assert drafter_digest(tmp_path / "copy") == digest
        taken = RecordingContext.under(tmp_path / "taken", {"target": plain_artifact})
        champion = resolve(config).champion
        assert champion is not None
        CHAMPION.run(taken, champion)
        assert drafter_digest(taken.out / DRAFTER_FOLDER) == digest
    else:
        with pytest.raises(DraftsmithError, match=r"version 1: .*model\.safetensors: .*: restore it .*promote") as said:
            registry_commands.rollback(Display(), line, "it accepts nothing", dry_run=False)
        assert "--force" not in str(said.value)
    assert serving(line) == (1 if upload else 2)


def test_a_line_that_another_mlflow_has_does_not_begin_here_unasked(
    line: str, home: Path, drafters: list[ArtifactRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command in a shell without the schedule's variables: its drafter would have no champion to beat."""
    registered.note_tracker(Tracking(home))
    finished(config_of(line), gated(Store(home / "store"), drafters[0]))
    assert resolve(config_of("another")).champion is None, "a line may begin where others are"
    with monkeypatch.context() as forgotten:
        forgotten.delenv("MLFLOW_TRACKING_URI")
        wanted = rf"^{line}: it has no version here; .* in sqlite:.*, none in mlflow\.db\. Set MLFLOW_TRACKING_URI as"
        with pytest.raises(DraftsmithError, match=wanted):
            resolve(config_of(line))
        assert resolve(config_of(line, registry={"name": line, "restart": True})).champion is None
    assert resolve(config_of(line)).champion is not None
