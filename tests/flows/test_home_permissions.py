"""Permissions of a home: only its owner or also its group may read it, and a reader can look without changing it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from draftsmith.artifacts.home import apply_user_umask, home_umask, protect_home
from draftsmith.artifacts.store.local import Store
from draftsmith.flows.cli.main import main
from tests.flows.processes import ROOT
from tests.flows.toy import TOY, write_config
from tests.testbed.artifacts import committed

NOBODY = 65534


pytestmark = pytest.mark.usefixtures("usual_umask")


def modes(home: Path) -> set[int]:
    """Return the modes of everything in the home, without the bits for execution."""
    return {path.lstat().st_mode & 0o666 for path in (home, *home.rglob("*"))}


def tree(home: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in (home, *home.rglob("*"))}


@pytest.mark.parametrize(("group_may_read", "files"), [(False, {0o600}), (True, {0o640})])
def test_a_home_is_for_its_owner_or_its_group(
    home: Path, tmp_path: Path, group_may_read: bool, files: set[int]
) -> None:
    config = write_config(tmp_path / "toy.yaml", stages={"min_free_gb": 0.01, "group_may_read": group_may_read})
    assert main(["stage", "target", str(config)], TOY) == 0
    folders = {path.stat().st_mode & 0o777 for path in (home, *home.rglob("*")) if path.is_dir()}
    assert folders == ({0o750} if group_may_read else {0o700})
    assert modes(home) - {0o600} == files - {0o600}  # locks and logs of servers may be 0600 in any case
    assert (home / "mlflow.db").stat().st_mode & 0o777 in files


def test_an_open_home_is_closed_to_others(home: Path) -> None:
    home.mkdir(mode=0o755)
    protect_home(home, group_may_read=False)
    (home / "file").touch()
    assert os.umask(0o022) == 0o077, "it is that of the whole run"
    assert (home.stat().st_mode & 0o777, (home / "file").stat().st_mode & 0o777) == (0o700, 0o600)


def test_exported_files_have_the_users_permissions(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with home_umask(tmp_path):
        out.mkdir()
        (out / "model.safetensors").touch()
        assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o600
        apply_user_umask(out)
    assert (out.stat().st_mode & 0o777, (out / "model.safetensors").stat().st_mode & 0o777) == (0o755, 0o644)


COMMANDS = """
import json, sys
from draftsmith.flows.cli.main import main
from tests.flows.toy import TOY
for arguments in json.loads(sys.argv[1]):
    for stream in (sys.stdout, sys.stderr):
        print(f"== {arguments}", file=stream, flush=True)
    print(f"code {main(arguments, TOY)}", flush=True)
"""


def as_reader(home: Path, commands: list[list[str]]) -> list[str]:
    """Return what commands print if run by a user who reads the home through its group (root without capabilities)."""
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*powerless, sys.executable, "-c", COMMANDS, json.dumps(commands)],
        cwd=ROOT,
        env={**os.environ, "DRAFTSMITH_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = [stream.split("== ")[1:] for stream in (done.stdout, done.stderr)]
    assert len(said[0]) == len(commands), done.stderr
    return [out + err for out, err in zip(*said, strict=True)]


def give_away(home: Path) -> None:
    """Make everything read-only and, where possible, another user's."""
    for path in (home, *home.rglob("*")):
        if os.geteuid() == 0:
            os.chown(path, NOBODY, os.getgid())
        path.chmod(path.stat().st_mode & ~0o222)


@pytest.mark.integration
def test_a_user_with_read_access_can_look_but_changes_nothing(home: Path, tmp_path: Path) -> None:
    stages = {"min_free_gb": 0.01, "group_may_read": True}
    config = str(write_config(tmp_path / "toy.yaml", stages=stages))
    assert main(["stage", "target", config], TOY) == 0
    reported = committed(Store(home / "store"), "report", {"report.html": "<p>"}, "cd")
    give_away(home)
    before = tree(home)
    expected = {
        ("status",): (0, "done"),
        ("status", config): (0, "waits for left"),
        ("show", "collect", "--verify"): (0, "every checksum is right"),
        ("report", "cdcdcdcd"): (0, str(reported.path / "report.html")),
        ("champions", "nobody"): (2, "no refresh has registered a drafter"),
        ("promote", "nobody@1"): (2, "nobody has no version 1"),
        ("stage", "left", config): (2, "permission denied"),
    }
    said = as_reader(home, [list(arguments) for arguments in expected])
    for text, (arguments, (code, words)) in zip(said, expected.items(), strict=True):
        assert f"code {code}\n" in text and words in text and "Traceback" not in text, (arguments, text)
    assert tree(home) == before
