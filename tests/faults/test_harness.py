"""The harness itself: that it meets every stage, goes on where it was stopped, and notices what must not happen."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.artifacts.test_store import KEY, OTHER, make
from tests.faults import configs, preload
from tests.faults.home import Ended, Home
from tests.faults.proxy import Mood, Proxy
from tests.faults.run import cases, read_rows, series, write_rows
from tests.faults.scene import Broken, Scene, TooLate
from tests.faults.table import Row, table
from tests.faults.undisturbed import NodeTimes, Undisturbed
from tests.stages.engines.http_server import HttpServer, answer, serving

ROLLOUT, SFT = f"rollout/{KEY[:16]}", f"sft/{OTHER[:16]}"


def test_every_stage_is_hit_by_every_signal() -> None:
    hit = {(case.fault.name, case.node) for case in cases(0)}
    nodes = [node for kind in (configs.PLAIN, configs.LINE) for node in configs.NODES[kind]]
    for number in ("SIGKILL", "SIGTERM", "SIGSTOP", "SIGINT"):
        for whom in ("stage", "command"):
            of_it = {node for name, node in hit if name.startswith(f"{number} to the {whom}")}
            assert of_it == set(nodes)
    assert len(hit) > 200


def test_every_fault_comes_once_before_any_comes_again() -> None:
    names = [case.fault.name for case in cases(0)]
    assert set(names[: len(set(names))]) == set(names)


def test_a_seed_gives_one_order_and_more_runs_than_faults_begin_again() -> None:
    assert [case.name for case in cases(3)] == [case.name for case in cases(3)] != [case.name for case in cases(4)]
    played = [case.name for case in series(0, 5, ["SIGKILL to the stage/opd", "full disk/opd"])]
    assert [number for _, _, number in played] == [0, 0, 1, 1, 2]
    assert len(set(played)) == 5


def row(**fields: object) -> Row:
    values = {"fault": "full disk", "node": "opd", "number": 0, "seed": 0, "point": "working +0.50", "outcome": "ok"}
    return Row(**{**values, "message": "", "seconds": 9.5, "commit": "abc", "at": "", **fields})  # type: ignore[arg-type]


def test_rows_are_kept_and_the_table_counts_what_did_not_end_well(tmp_path: Path) -> None:
    rows = [row(), row(number=1, outcome="1 processes are left"), row(node="sft")]
    write_rows(tmp_path / "rows.jsonl", rows[:1])
    write_rows(tmp_path / "rows.jsonl", rows[1:])
    assert read_rows(tmp_path / "rows.jsonl") == rows
    said = table(rows)
    cells = next(line for line in said.splitlines() if line.startswith("| full disk"))
    assert [cell.strip() for cell in cells.split("|") if cell.strip()] == ["full disk", "1", "1 of 2", "2 of 3"]
    assert "- full disk, opd (working +0.50): 1 processes are left" in said
    assert "3 runs, 2 ended well" in said


@pytest.fixture
def calm(tmp_path: Path) -> Undisturbed:
    """What a refresh of two nodes would have left."""
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


def ended(out: str = "rollout: started\nrollout: done in 2 s\nsft: reused\n", code: int = 0) -> Ended:
    return Ended(code, out, "", 1.0)


def test_a_home_that_is_as_it_was_is_well(calm: Undisturbed) -> None:
    scene = scene_of(calm)
    make(scene.home.store)
    scene.finished(ended())


def test_another_content_is_noticed(calm: Undisturbed) -> None:
    scene = scene_of(calm)
    make(scene.home.store, "another answer")
    with pytest.raises(Broken, match="another content"):
        scene.finished(ended())


def test_an_artifact_that_nobody_should_have_made_is_noticed(calm: Undisturbed) -> None:
    scene = scene_of(calm)
    make(scene.home.store)
    make(scene.home.store, key="ef" * 32)
    with pytest.raises(Broken, match="should not be there"):
        scene.finished(ended())


def test_a_version_too_many_is_noticed(calm: Undisturbed) -> None:
    scene = scene_of(calm)
    make(scene.home.store)
    with closing(sqlite3.connect(scene.home.path / "mlflow.db")) as database, database:
        database.execute("insert into model_versions values (1), (2)")
        database.execute("insert into registered_model_aliases values (2, 'champion')")
    with pytest.raises(Broken, match=r"versions \[\['1'\], \['2', 'champion'\]\]"):
        scene.finished(ended())


def test_repeated_work_is_noticed(calm: Undisturbed) -> None:
    scene = scene_of(calm)
    make(scene.home.store)
    with pytest.raises(Broken, match="sft: finished work was repeated"):
        scene.finished(ended("rollout: started\nrollout: done in 2 s\nsft: started\nsft: done in 2 s\n"))


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
    said = "rollout: started\nrollout: continuing from the checkpoint at step {} of 12\nrollout: done in 2 s\n"
    scene.kept(ended(said.format(8)), scene.saved())
    scene.kept(ended("rollout: started\n"), scene.saved())  # killed again before it said anything
    with pytest.raises(Broken, match="8 steps or answers were saved, and the same command went on from 4"):
        scene.kept(ended(said.format(4)), scene.saved())
    with pytest.raises(Broken, match="went on from 0"):
        scene.kept(ended(), scene.saved())


def test_what_is_left_is_noticed(calm: Undisturbed) -> None:
    scene = scene_of(calm)
    with scene.home.store.claim("rollout", KEY), pytest.raises(Broken, match="is held"):
        scene.nothing_left()
    make(scene.home.store)
    (scene.home.folder_of(SFT) / ".tmp-1-x").write_text("half")
    with pytest.raises(Broken, match=r"\.tmp-1-x.* is left"):
        scene.finished(ended())


def test_a_wrong_code_is_broken_a_silent_command_a_complaint_and_a_finished_one_too_late(calm: Undisturbed) -> None:
    scene = scene_of(calm)
    with pytest.raises(Broken, match="ended with 1, not"):
        scene.told(ended("rollout: started\n", 1), [2], "disk is full")
    with pytest.raises(TooLate):
        scene.told(ended(), [2], "disk is full")
    scene.told(ended("rollout: started\n", 2), [2], "disk is full")
    assert scene.complaints == ["the message says nothing of 'disk is full': ''"]


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with serving(answer, health=lambda _: {}) as running:
        yield running


def ask(url: str, limit_s: float = 30) -> bytes:
    body = json.dumps({"input_ids": [7], "sampling_params": {"max_new_tokens": 3}}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/generate", body), timeout=limit_s) as response:
        return bytes(response.read())


def test_a_proxy_spoils_answers_as_it_is_told(server: HttpServer) -> None:
    address = urlsplit(server.url)
    proxy = Proxy((str(address.hostname), int(address.port or 0)))
    assert json.loads(ask(proxy.url))["output_ids"] == [8, 9, 10]
    proxy.mood = Mood.WRONG
    assert json.loads(ask(proxy.url))["output_ids"] == [9, 9, 99]
    proxy.mood = Mood.GARBAGE
    with pytest.raises(ValueError):
        json.loads(ask(proxy.url))
    for mood in (Mood.HALF, Mood.SILENT, Mood.GONE):
        proxy.mood = mood
        with pytest.raises((OSError, HTTPException)):
            ask(proxy.url, limit_s=1)
    assert proxy.spoiled >= 5
    proxy.mood = Mood.WELL
    assert json.loads(ask(proxy.url))["output_ids"] == [8, 9, 10]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_clock_jumps_and_a_stage_hangs_and_is_deaf(calm: Undisturbed) -> None:
    scene = scene_of(calm)
    switches = preload.Switches(scene)
    told = "import time; print(time.time())"
    switches.turn(clock_s=86_400)
    environment = {**os.environ, **switches.variables}
    shown = subprocess.run([sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=True)
    assert float(shown.stdout) - time.time() == pytest.approx(86_400, abs=30)

    switches.turn(hang=True, deaf=True)
    deaf = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); open('/dev/null', 'w').write('x')"
    )
    stage = subprocess.Popen([sys.executable, "-c", deaf, "draftsmith.stages"], env=environment)
    time.sleep(0.3)
    stage.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        stage.wait(0.5)
    stage.kill()
    stage.wait()
