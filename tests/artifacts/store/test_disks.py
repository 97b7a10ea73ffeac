"""Full and read-only disks give one clear error and lose nothing that was computed before. Every cause is real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

# Commits a small artifact, makes the disk refuse writes, then tries another; argv = folder, code that makes it refuse.
SCRIPT = """
    import os, resource, subprocess, sys
    from pathlib import Path
    from draftsmith.artifacts.errors import DraftsmithError
    from draftsmith.artifacts.tables.parquet import write_table
    from draftsmith.artifacts.tables.schemas import PROMPTS
    from draftsmith.artifacts.store.attempt import Attempt
    from draftsmith.artifacts.store.local import Store
    from tests.testbed.artifacts import made_from

    folder = Path(sys.argv[1])
    store = Store(folder / "store")

    def make(key, tokens):
        with store.claim("prompts", key * 64) as claim:
            assert isinstance(claim, Attempt)
            row = dict(prompt_id="a", source="", split="train", messages=[], token_ids=tokens)
            write_table(claim.out / "prompts.parquet", PROMPTS, [row])
            return claim.commit(made_from(claim))

    first = make("a", [1, 2, 3])
    exec(sys.argv[2])
    try:
        make("b", list(os.urandom(2_000_000)))
    except DraftsmithError as error:
        print(error)
    else:
        sys.exit("the disk accepted everything, so the test is void")
    finally:
        os.seteuid(os.getuid())
    assert [m.key[0] for m in store.list()] == ["a"]
    store.verify(first)
    partial = store.partial_path("prompts", "b" * 64)
    assert not partial.exists() or not list(partial.rglob("*.parquet")) + list(partial.rglob("manifest.json"))
"""


def printed(script: str, folder: Path, *arguments: str, size: str | None = None) -> list[str]:
    """Run a script and return its lines; with `size`, on a tmpfs in a mount namespace that ends with it."""
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder), *arguments]
    if size is not None:
        inside = f'mount -t tmpfs -o size={size} draftsmith "$0" && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", inside, str(folder), *command]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def try_disk(folder: Path, refuse: str, size: str | None = None) -> str:
    (message,) = printed(SCRIPT, folder, refuse, size=size)
    return message


def can_mount() -> bool:
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=64k", "probe", "/tmp"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


def test_a_full_disk_is_one_clear_error_and_earlier_artifacts_stay(tmp_path: Path) -> None:
    """Uses a tmpfs of 1 MiB where mounts are allowed, else a limit on the size of files."""
    if can_mount():
        message = try_disk(tmp_path, "", size="1m")
        assert "the disk is full" in message
    else:
        message = try_disk(tmp_path, "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))")
        assert "File too large" in message
    assert "prompts.parquet" in message


COMMIT = """
    import sys
    from pathlib import Path
    from draftsmith.artifacts.store.local import Store
    from tests.testbed.artifacts import made_from

    store = Store(Path(sys.argv[1]))
    with store.claim("rollout", "ab" * 32) as claim:
        (claim.out / "answers").write_bytes(bytes(500_000))
        try:
            with (store.root / "other").open("wb", 0) as other:
                while True:
                    other.write(bytes(4096))
        except OSError as error:
            print(error.strerror)
        made = claim.commit(made_from(claim))
    print(*sorted(path.name for path in made.path.iterdir()))
"""


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount")
def test_a_disk_that_fills_up_after_the_stage_does_not_prevent_the_commit(tmp_path: Path) -> None:
    """The attempt reserved space for its manifest at the start."""
    assert printed(COMMIT, tmp_path, size="1m") == ["No space left on device", "answers manifest.json"]


TORCH = """
    import sys
    from pathlib import Path
    import torch
    from draftsmith.artifacts.errors import find_disk_error, from_os_error
    from draftsmith.stages.drafters.checkpoint_format import write_checkpoint
    from draftsmith.stages.runtime.checkpoint import save_checkpoint

    folder = Path(sys.argv[1])
    layer = torch.nn.Linear(1000, 1000)
    optimiser = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 1000)).sum().backward()
    optimiser.step()
    for attempt in (
        lambda: save_checkpoint(folder, 1, {"layer": layer.state_dict(), "optimiser": optimiser.state_dict()}),
        lambda: write_checkpoint(folder, {}, {"weight": layer.weight}),
    ):
        try:
            attempt()
        except Exception as error:
            print(from_os_error(find_disk_error(error), type(error).__name__))
"""


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount: torch sees a full disk only on a full disk")
def test_a_full_disk_is_recognized_in_errors_of_torch_and_safetensors(tmp_path: Path) -> None:
    checkpoint, drafter = printed(TORCH, tmp_path, size="1m")
    assert "the disk is full" in checkpoint and "the disk is full" in drafter
    assert drafter.startswith("SafetensorError")


def test_a_folder_without_permission_is_one_clear_error(tmp_path: Path) -> None:
    """Root ignores permissions, so the test drops its privileges for the attempt."""
    refuse = "os.chmod(store.root / 'prompts', 0o555)\nos.chmod(store.root, 0o555)"
    if os.geteuid() == 0:
        tmp_path.chmod(0o755)
        for parent in tmp_path.parents:  # pytest's own folders are private to root
            if parent.owner() == "root" and "pytest" in parent.name:
                parent.chmod(0o755)
        refuse += "\nos.seteuid(65534)"
    message = try_disk(tmp_path, refuse)
    assert "permission denied" in message


@pytest.mark.skipif(
    not can_mount(), reason="needs the right to mount: a read-only file system cannot be made otherwise"
)
def test_a_read_only_file_system_is_one_clear_error(tmp_path: Path) -> None:
    refuse = "subprocess.run(['mount', '-o', 'remount,ro', str(folder)], check=True)"
    message = try_disk(tmp_path, refuse, size="32m")
    assert "the file system is read-only" in message
