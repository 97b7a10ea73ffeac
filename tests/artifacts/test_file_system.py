"""SQLite databases are refused on network file systems. The table of mounts is injected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.host import network_file_system
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.orchestration.server import check_database_location, prefect_server

Mount = Callable[..., None]


@pytest.fixture
def mount(monkeypatch: pytest.MonkeyPatch) -> Mount:
    """A function that sets the mounts, as (folder, type); later ones are on top."""

    def table(*mounts: tuple[Path, str]) -> None:
        found = [
            SimpleNamespace(mountpoint=str(folder), fstype=kind) for folder, kind in [(Path("/"), "ext4"), *mounts]
        ]
        monkeypatch.setattr(psutil, "disk_partitions", lambda **_: found)

    return table


@pytest.mark.parametrize("kinds", [("nfs4",), ("fuse.sshfs",), ("nfs", "ext4"), ("nfs", "fuse.fuse-overlayfs")])
def test_the_last_mount_decides_whether_a_file_system_is_a_network_one(
    kinds: tuple[str, ...], mount: Mount, tmp_path: Path
) -> None:
    folder = tmp_path / "team data"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    mount(*((folder, kind) for kind in kinds))
    for path in (folder / "not" / "there yet", tmp_path / "link" / "mlflow.db"):
        assert network_file_system(path) == (f"{kinds[0]} at {folder}" if len(kinds) == 1 else None)
    assert network_file_system(tmp_path / "team data2") is None


def test_mlflows_database_is_refused_on_a_network_file_system(
    mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount((tmp_path / "home", "nfs4"))
    (tmp_path / "home").mkdir()
    with pytest.raises(DraftsmithError, match=r"MLflow's database .* \(nfs4 at .*set MLFLOW_TRACKING_URI") as caught:
        Tracking(tmp_path / "home").check()
    assert caught.value.exit_code == 2 and not list((tmp_path / "home").iterdir())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/local.db")
    Tracking(tmp_path / "home").check_file_system()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/home/other.db")
    with pytest.raises(DraftsmithError, match="network file system"):
        Tracking(tmp_path).check()


def test_prefects_database_is_refused_on_a_network_file_system(
    mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount((tmp_path / "home", "lustre"))
    (tmp_path / "home").mkdir()
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_API_DATABASE_CONNECTION_URL"):
        monkeypatch.setenv(name, "")  # so that what `prefect_server` sets is undone too
        monkeypatch.delenv(name)
    refused = pytest.raises(DraftsmithError, match=r"Prefect's database .* \(lustre at .*set PREFECT_API_URL")
    with refused, prefect_server(tmp_path / "home"):
        pass
    assert not list((tmp_path / "home").iterdir())
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql+asyncpg://host/prefect")
    check_database_location(tmp_path / "home")
    monkeypatch.delenv("PREFECT_API_DATABASE_CONNECTION_URL")
    monkeypatch.setenv("PREFECT_API_URL", "http://host:4200/api")
    check_database_location(tmp_path / "home")
