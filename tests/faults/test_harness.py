"""The harness: it strikes every stage, continues where it was stopped, and notices what must not happen."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.artifacts.store.test_store import KEY, OTHER, make
from tests.faults import configs
from tests.faults.home import Ended, Home
from tests.faults.scene import Broken, Scene, TooLate
from tests.faults.table import Row
from tests.faults.undisturbed import NodeTimes, Undisturbed

ROLLOUT, SFT = f"rollout/{KEY[:16]}", f"sft/{OTHER[:16]}"


def row(**fields: object) -> Row:
    values = {"fault": "full disk", "node": "opd", "number": 0, "seed": 0, "point": "working +0.50", "outcome": "ok"}
    return Row(**{**values, "message": "", "seconds": 9.5, "commit": "abc", "at": "", **fields})  # type: ignore[arg-type]


@pytest.fixture
def calm(tmp_path: Path) -> Undisturbed:
    """Return the record of a refresh of two nodes, with its home."""
    folder, kept = tmp_path / "scene", tmp_path / "kept"
    home = Home(folder, folder / "tiny.yaml")
    make(home.store)
    make(home.store, "weights", key=OTHER, stage="sft")
    with closing(sqlite3.connect(home.path / "mlflow.db")) as database:
        database.execute("create table runs (name, status)")
        database.execute("create table model_versions (version)")
        database.execute("create table registered_model_aliases (version, alias)")
    shutil.copytree(folder, kept)
    nodes = {"rollout": NodeTimes(ROLLOUT, 1, 1), "sft": NodeTimes(SFT, 1, 1)}
    return Undisturbed(configs.PLAIN, "tiny.yaml", folder, kept, home.content_ids(), nodes, 0, 2.0)


def scene_of(calm: Undisturbed) -> Scene:
    return Scene(calm, "rollout", random.Random(0))


ENDED = "rollout: started\nrollout: done in 2 s\n"


def ended(out: str = f"{ENDED}sft: reused\n", code: int = 0) -> Ended:
    return Ended(code, out, "", 1.0)


def test_a_home_that_is_as_it_was_is_well(calm: Undisturbed) -> None:
    scene = scene_of(calm)
    make(scene.home.store)
    scene.finished(ended())


def add_a_version(home: Home) -> None:
    with closing(sqlite3.connect(home.path / "mlflow.db")) as database, database:
        database.execute("insert into model_versions values (1), (2)")
        database.execute("insert into registered_model_aliases values (2, 'champion')")


@pytest.mark.parametrize(
    ("change", "out", "expected"),
    [
        (lambda home: make(home.store, "another answer"), ENDED, "another content"),
        (lambda home: make(home.store, key="ef" * 32), ENDED, "should not be there"),
        (add_a_version, ENDED, r"versions \[\['1'\], \['2', 'champion'\]\]"),
        (lambda _: None, f"{ENDED}sft: started\nsft: done in 2 s\n", "sft: finished work was repeated"),
    ],
)
def test_what_must_not_happen_is_noticed(
    change: Callable[[Home], object], out: str, expected: str, calm: Undisturbed
) -> None:
    scene = scene_of(calm)
    change(scene.home)
    if not scene.home.folder_of(ROLLOUT).exists():
        make(scene.home.store)
    with pytest.raises(Broken, match=expected):
        scene.finished(ended(out))


def test_steps_before_the_last_checkpoint_that_were_lost_are_noticed(calm: Undisturbed) -> None:
    scene = scene_of(calm)
    request = scene.home.path / "logs" / f"{ROLLOUT.replace('/', '-')}-1-2.request.json"
    metrics = scene.home.partial_of(ROLLOUT) / "out" / "metrics.jsonl"
    for path in (request, metrics):
        path.parent.mkdir(parents=True)
    request.write_text(json.dumps({"config": {"checkpoint_every": 4}}))
    assert scene.saved() == 0
    metrics.write_text(11 * "{}\n")
    assert scene.saved() == 8
    out = "rollout: started\nrollout: continuing from the checkpoint at step {} of 12\nrollout: done in 2 s\n"
    scene.kept(ended(out.format(8)), scene.saved())
    scene.kept(ended("rollout: started\n"), scene.saved())  # killed again before it reported anything
    with pytest.raises(Broken, match="8 steps or answers were saved, but the same command continued from 4"):
        scene.kept(ended(out.format(4)), scene.saved())
    with pytest.raises(Broken, match="continued from 0"):
        scene.kept(ended(), scene.saved())


def test_what_is_left_is_noticed(calm: Undisturbed) -> None:
    scene = scene_of(calm)
    with scene.home.store.claim("rollout", KEY), pytest.raises(Broken, match="is locked"):
        scene.nothing_left()
    make(scene.home.store)
    (scene.home.folder_of(SFT) / ".tmp-1-x").write_text("half")
    with pytest.raises(Broken, match=r"\.tmp-1-x.* is left"):
        scene.finished(ended())


def test_a_wrong_code_is_broken_a_silent_command_a_complaint_and_a_finished_one_too_late(calm: Undisturbed) -> None:
    scene = scene_of(calm)
    with pytest.raises(Broken, match="ended with 1, not"):
        scene.check_end(ended("rollout: started\n", 1), [2], "disk is full")
    with pytest.raises(TooLate):
        scene.check_end(ended(), [2], "disk is full")
    scene.check_end(ended("rollout: started\n", 2), [2], "disk is full")
    assert scene.complaints == ["the message does not mention 'disk is full': ''"]
