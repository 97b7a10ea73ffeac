"""The store under kills and races, with real processes."""

from __future__ import annotations

import getpass
import os
import platform
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import pytest

from draftsmith.artifacts.locks import Holder, LockTimeoutError, LockWait
from draftsmith.artifacts.store.attempt import Attempt
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from tests.artifacts.store.test_store import KEY, commit
from tests.flows.processes import wait_until
from tests.testbed.artifacts import made_from

pytestmark = pytest.mark.integration

# Script of a process that makes an artifact: argv = store root, key, code of the body, "force" or "".
RUNNER = textwrap.dedent(
    """
    import os, signal, sys, time
    from pathlib import Path
    from draftsmith.artifacts.errors import DraftsmithError
    from draftsmith.artifacts.store.attempt import Attempt
    from draftsmith.artifacts.store.local import Store
    from tests.testbed.artifacts import made_from

    store = Store(Path(sys.argv[1]))
    def make():
        with store.claim("rollout", sys.argv[2], force=sys.argv[4] == "force") as claim:
            if isinstance(claim, Attempt):
                exec(sys.argv[3], globals() | {"claim": claim})
                return claim.commit(made_from(claim))
            return claim
    try:
        print(make().content_id)
    except DraftsmithError as error:
        sys.exit(f"error: {error}")
    """
)


def start(root: Path, body: str, *, force: bool = False, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-c", RUNNER, str(root), KEY, textwrap.dedent(body), "force" if force else ""]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_killed_attempt_leaves_no_artifact_and_no_lock_but_its_work(store: Store) -> None:
    process = start(
        store.root,
        """
        (claim.work / "checkpoint").write_text("step 7")
        (claim.out / ".tmp-9-data.txt").write_text("half")
        print("written", flush=True)
        time.sleep(60)
        """,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    assert store.is_claimed("rollout", KEY)
    process.kill()
    process.wait()
    assert not store.is_claimed("rollout", KEY)
    assert store.find("rollout", KEY) is None and store.list() == []
    with store.claim("rollout", KEY) as claim:
        assert isinstance(claim, Attempt)
        assert (claim.work / "checkpoint").read_text() == "step 7"
        (claim.out / "data.txt").write_text("answer")
        ref = commit(claim)
    assert list(ref.manifest.files) == ["data.txt"]  # the half-written file is not part of it


def test_a_child_that_inherited_the_lock_keeps_it_when_its_parent_is_killed(store: Store) -> None:
    process = start(
        store.root,
        """
        import subprocess
        child = subprocess.Popen(["sleep", "60"], pass_fds=[claim.lock.fd])
        print(child.pid, flush=True)
        time.sleep(60)
        """,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert store.is_claimed("rollout", KEY)
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: not store.is_claimed("rollout", KEY), "it is free", limit_s=10)


def test_a_waiting_claim_reports_the_holder_once_and_at_the_end_of_its_wait(store: Store) -> None:
    process = start(store.root, 'print("held", flush=True); time.sleep(1.5); (claim.out / "data.txt").write_text("x")')
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(LockTimeoutError, match=rf"pid {process.pid} of .* since .*stages\.lock_wait_minutes") as caught,
        store.claim("rollout", KEY, wait=LockWait(0.3, "stages.lock_wait_minutes")),
    ):
        pass
    assert caught.value.exit_code == 75
    holders: list[Holder | None] = []
    with store.claim("rollout", KEY, wait=LockWait(on_wait=holders.append)) as found:
        assert isinstance(found, Artifact)
    (holder,) = holders
    assert holder is not None and holder.pid == process.pid
    assert (holder.host, holder.user) == (platform.node(), getpass.getuser())
    assert abs((datetime.now(UTC) - datetime.fromisoformat(holder.since)).total_seconds()) < 60
    process.wait()


@pytest.mark.parametrize("lost", ["removed", "made again", "freed"])
def test_a_paused_holder_whose_lock_was_taken_over_cannot_commit(store: Store, lost: str) -> None:
    """On a shared file system a slow holder may lose its lock: the file is removed, or released to another."""
    process = start(
        store.root,
        """
        (claim.out / "data.txt").write_text("of the paused one")
        print("paused", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            claim.commit(made_from(claim))
        except DraftsmithError as error:
            print(type(error).__name__, error, flush=True)
        else:
            print("committed", flush=True)
        """,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "paused\n"
    stat = Path(f"/proc/{process.pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it is stopped")
    lock = store.root / "rollout" / f".lock-{KEY[:16]}"
    if lost == "freed":  # another machine sees the same note in an unlocked file
        note = lock.read_bytes()
        lock.unlink()
        lock.write_bytes(note)
    else:
        lock.unlink()
    if lost != "removed":
        with store.claim("rollout", KEY) as claim:
            assert isinstance(claim, Attempt)
            (claim.out / "data.txt").write_text("another")
            ref = claim.commit(made_from(claim))
    process.send_signal(signal.SIGCONT)
    message = process.stdout.readline()
    process.wait()
    assert message.startswith("LockLostError")
    if lost == "removed":
        assert store.find("rollout", KEY) is None
    else:
        assert (ref.path / "data.txt").read_text() == "another"
