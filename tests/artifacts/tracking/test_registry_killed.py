"""A run is killed, or loses MLflow, while it registers, promotes or rolls back a version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.tracking.registry import Registry, Version
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh import registry_commands
from tests.artifacts.tracking.test_registry import ref, serving

LINE = "tiny-dflash"


class Killed(BaseException):
    """Simulates SIGKILL: no handler catches it."""


def killed(*_: Any, **__: Any) -> None:
    raise Killed


def test_the_same_command_registers_no_second_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, made = Registry(Tracking(tmp_path / "home")), ref(tmp_path, "a")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(MlflowClient, "set_model_version_tag", killed)  # the first call after the version is created
        registry.register(LINE, made, {"tau": "2.5"})
    registry.register(LINE, made, {"tau": "2.5"})
    (version,) = registry.versions(LINE)
    assert (version.number, version.content_id, version.tags["tau"]) == (1, made.content_id, "2.5")


WRITES = (
    "set_registered_model_tag",
    "set_registered_model_alias",
    "set_model_version_tag",
    "delete_registered_model_alias",
)


class Losing:
    """MLflow's client, which is killed after its n-th write."""

    def __init__(self, patched: pytest.MonkeyPatch, last: int) -> None:
        self.left = last
        for name in WRITES:
            patched.setattr(MlflowClient, name, self._counted(getattr(MlflowClient, name)))

    def _counted(self, call: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            made = call(*arguments, **options)
            self.left -= 1
            if self.left == 0:
                raise Killed
            return made

        return counted


def served(registry: Registry, folder: Path, line: str, *tags: dict[str, str]) -> list[Version]:
    """Register a version for each of the tags, and promote one after the other."""
    versions = [registry.register(line, ref(folder, f"{line}-{index}"), given) for index, given in enumerate(tags)]
    for before, version in zip([None, *versions], versions, strict=False):
        registry.promote(version, expected=before, why="better")
    return versions


@pytest.fixture
def by_hand(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry for the commands; its versions have no files."""
    monkeypatch.setattr(registry_commands, "registry", lambda: registry)
    monkeypatch.setattr(registry_commands, "verify_checkpoint", lambda _version: None)


@pytest.mark.parametrize("writes", [1, 2, 3, 4])
def test_the_same_call_completes_an_interrupted_promotion(
    writes: int, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"promoted-{writes}"
    first, second = (registry.register(line, ref(tmp_path, f"{writes}{name}"), {}) for name in "ab")
    registry.promote(first, expected=None, why="the first one")
    third = registry.register(line, ref(tmp_path, f"{writes}c"), {})
    with monkeypatch.context() as patched, pytest.raises(Killed):
        Losing(patched, writes)
        registry.promote(third, expected=first, why="better")
    assert {first.content_id, third.content_id} <= registry.needed_content_ids(), "neither may be pruned"
    registry.promote(third, expected=first, why="better")
    assert [(each.version, each.before) for each in registry.events(line)] == [(1, None), (3, 1)]
    assert [(each.number, each.aliases) for each in registry.versions(line)] == [
        (first.number, ("previous",)),
        (second.number, ()),
        (third.number, ("champion",)),
    ]


@pytest.mark.usefixtures("by_hand")
def test_a_deleted_previous_version_is_no_interrupted_promotion(registry: Registry, tmp_path: Path) -> None:
    first, second = served(registry, tmp_path, "cleaned", {}, {})
    third = registry.register("cleaned", ref(tmp_path, "c"), {})
    registry._tracking.connect()[0].delete_model_version("cleaned", str(first.number))
    registry_commands.promote(Display(), f"cleaned@{third.number}", "by hand", dry_run=False)
    assert serving(registry, "cleaned") == (third.number, second.number)


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("writes", [1, 2, 3])
def test_repeating_a_rollback_does_not_undo_it(
    writes: int, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"rolled-back-{writes}"
    good, bad = served(registry, tmp_path, line, {}, {})
    with monkeypatch.context() as patched, pytest.raises(Killed):
        Losing(patched, writes)
        registry_commands.rollback(Display(), line, "it accepts nothing", dry_run=False)
    registry_commands.rollback(Display(), line, "it accepts nothing", dry_run=False)
    assert serving(registry, line) == (1, 2)
    assert [each.what for each in registry.events(line)] == ["promoted", "promoted", "rolled back to"]
    undone = registry.rollback_event(bad)
    assert undone is not None and undone.why == "it accepts nothing" and registry.rollback_event(good) is None
    registry.promote(bad, expected=good, why="by hand")
    assert registry.rollback_event(bad) is None


@pytest.mark.usefixtures("by_hand")
def test_a_second_rollback_does_not_restore_what_the_first_removed(registry: Registry, tmp_path: Path) -> None:
    line = "rolled-back-twice"
    good, _ = served(registry, tmp_path, line, {}, {})
    registry_commands.rollback(Display(), line, "it accepts nothing", dry_run=False)
    for dry_run in (True, False):
        with pytest.raises(DraftsmithError, match=rf"version 2 .*it accepts nothing.*promote {line}@VERSION"):
            registry_commands.rollback(Display(), line, "", dry_run=dry_run)
    assert serving(registry, line)[0] == good.number
    registry_commands.promote(Display(), f"{line}@2", "mended", dry_run=False)
    registry_commands.rollback(Display(), line, "", dry_run=False)  # what a hand has promoted goes back
    assert serving(registry, line)[0] == good.number


@pytest.mark.usefixtures("by_hand")
def test_a_rollback_warns_about_another_target(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "of-two-targets"
    served(registry, tmp_path, line, *({"target_digest": digest * 64} for digest in "abb"))
    registry_commands.rollback(Display(), line, "", dry_run=False)
    assert "warning" not in capsys.readouterr().out
    registry_commands.promote(Display(), f"{line}@1", "", dry_run=True)
    assert (
        f"{line} version 1 was trained for target aaaaaaaaaaaa, version 2 for bbbbbbbbbbbb" in capsys.readouterr().out
    )


def test_permanent_errors_are_not_retryable(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(DraftsmithError, match="refused this") as refused:
        registry.register("a-line", ref(tmp_path, "a"), {f"server.{'x' * 300}": "a tag that MLflow refuses"})
    assert not isinstance(refused.value, RetryableError)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mlflow.db").write_text("no database at all, for 16 bytes and more")
    with pytest.raises(DraftsmithError, match=r"mlflow\.db: .*restore it from a backup.*lines, champions") as damaged:
        Registry(Tracking(tmp_path / "home")).champion("line")
    assert not isinstance(damaged.value, RetryableError)
