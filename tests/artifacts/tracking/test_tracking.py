"""MLflow runs of refreshes and stages, with a real SQLite database and real processes."""

from __future__ import annotations

import http.server
import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.locks import user_name
from draftsmith.artifacts.results.data import day
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import MANIFEST, Artifact
from draftsmith.artifacts.tracking import terms as mlflow_terms
from draftsmith.artifacts.tracking.refresh_runs import RefreshRun, describe_misplaced_files
from draftsmith.artifacts.tracking.runs import NOTE, Tracking
from draftsmith.artifacts.tracking.terms import MOST_PARAMS, flatten
from draftsmith.stages.engines.servers.process import free_ports
from tests.testbed.artifacts import committed, fake_artifact
from tests.testbed.databases import give_databases

pytestmark = pytest.mark.integration
KEY = "ab" * 32


def run_of(tracking: Tracking, run_id: str | None) -> Any:
    assert run_id is not None
    return client(tracking).get_run(run_id)


def client(tracking: Tracking) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking.uri)


def all_runs(tracking: Tracking) -> list[Any]:
    found = client(tracking).search_experiments()
    return [run for experiment in found for run in client(tracking).search_runs([experiment.experiment_id])]


def artifact(folder: Path) -> Artifact:
    folder.mkdir()
    for name in (MANIFEST, "summary.json", "report.html", "review.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return fake_artifact("mining", KEY, "f" * 64, folder)


def test_a_refresh_and_its_stages_are_nested_with_params_metrics_and_review_files(
    tracking: Tracking, tmp_path: Path
) -> None:
    ref = artifact(tmp_path / "a")
    opened = RefreshRun(tracking, "quickstart", {"name": "quickstart", "sft": {"steps": 3}})
    parent = opened.open()
    run = tracking.stage_run(parent, "sft", KEY, inputs={"trajectories": ref})
    for step in range(2500):  # more than two batches of MLflow
        run.metrics(step, {"loss": 3.0 - step / 1000})
    run.close("FINISHED", ref.path)
    metrics = {"tau_sft": 2.5, "tau_k=3+mine": 2.25}  # an arm's name may be anything
    opened.close("FINISHED", metrics=metrics, files=[ref.path / "report.html"])

    stage, refresh = run_of(tracking, run.run_id), run_of(tracking, parent)
    assert stage.data.tags["mlflow.parentRunId"] == parent
    assert stage.data.tags["key"] == KEY
    assert (stage.data.params, stage.data.metrics) == ({}, {"train/loss": 3.0 - 2499 / 1000})
    assert refresh.data.metrics == {"tau_sft": 2.5, "tau_k_3_mine": 2.25}
    assert max(refresh.data.metrics) < "train/", "MLflow sorts columns by name"
    history = client(tracking).get_metric_history(run.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == list(range(2500))
    (dataset,) = stage.inputs.dataset_inputs
    assert dataset.dataset.digest == "f" * 36
    assert ref.uri in dataset.dataset.source
    files = {file.path for file in client(tracking).list_artifacts(run.run_id)}
    assert files == {MANIFEST, "summary.json", "report.html", "review.json"}
    assert (refresh.info.status, stage.info.status) == ("FINISHED", "FINISHED")
    assert refresh.data.params["sft.steps"] == "3"
    assert Path(stage.info.artifact_uri.removeprefix("file://")).is_relative_to(tracking.folder / "mlartifacts")


def test_a_run_records_user_command_and_commit(
    tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(
        Path(mlflow_terms.__file__).parent, repository / "artifacts", ignore=shutil.ignore_patterns("*.pyc")
    )
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for words in (["init"], ["add", "."], [*identity, "commit", "-m", "one"]):
        subprocess.run(["git", *words], cwd=repository, check=True, capture_output=True)
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, check=True, capture_output=True, text=True)
    command = ["/usr/bin/draftsmith", "run", "weekly.yaml", "--set", "note=a b", "--url", "https://me:word@host/"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlflow_terms, "__file__", str(repository / "artifacts" / "terms.py"))
    run = run_of(tracking, (refresh := RefreshRun(tracking, "who", {})).open())
    tags, experiment = run.data.tags, client(tracking).get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert tags["mlflow.source.git.commit"] == found.stdout.strip()
    assert tags["mlflow.source.name"].startswith("draftsmith run weekly.yaml --set 'note=a b' --url ")
    assert "word" not in tags["mlflow.source.name"] and tags["mlflow.user"] == user_name()
    monkeypatch.setenv("PATH", "")  # no git
    refresh.close("FINISHED")
    tags = run_of(tracking, (refresh := RefreshRun(tracking, "who", {})).open()).data.tags
    assert "mlflow.source.git.commit" not in tags and "mlflow.user" in tags
    refresh.close("FINISHED")


def test_system_metrics_are_logged_and_resumed(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    for samples in (1, 2):
        run = tracking.stage_run(None, "sft", KEY)
        with run.system_metrics():
            time.sleep(1.5)
        run.close("FAILED")  # and is resumed
        history = client(tracking).get_metric_history(run.run_id, "system/cpu_utilization_percentage")
        steps = [metric.step for metric in history]
        assert len(steps) >= samples and sorted(set(steps)) == sorted(steps), "a resumed run continues the steps"


def test_data_sets_have_names_rows_and_columns(tracking: Tracking, tmp_path: Path) -> None:
    rows = [{"prompt_id": str(number), "split": "train"} for number in range(8)]
    counts = {"gsm8k": {"train": 4, "heldout": 1}, "gcd": {"train": 2}, "chain": {"validation": 1}}
    inputs = {"gone": fake_artifact("rollout", KEY, "gone" * 9, tmp_path / "gone")}
    window = {"since": "2026-11-23T03:00:00+00:00", "newest": "2026-11-30T02:58:00+00:00"}
    for node in ("prompts", "heldout", "logs"):

        def fill(out: Path, node: str = node) -> None:
            table = "trajectories" if node == "logs" else "table"
            parquet.write_table(pyarrow.Table.from_pylist(rows), out / f"{table}.parquet")
            summary = {"prompts": {"counts": counts}, "logs": {"window": window}}.get(node)
            if summary is not None:
                (out / f"{node}.json").write_text(json.dumps(summary))

        inputs[node] = committed(Store(tmp_path / "store"), node, fill, metrics={"response_tokens": 80.0})
    today = day(datetime.now(UTC))
    run = tracking.stage_run(None, "sft", KEY, inputs=inputs)
    found = {each.tags[0].value: each.dataset for each in run_of(tracking, run.run_id).inputs.dataset_inputs}
    run.close("FINISHED")
    names = {node: data.name for node, data in found.items()}
    assert names == {
        "prompts": f"prompts: 6 train, 1 validation, 1 heldout (gsm8k + 2), {today}",
        "heldout": f"heldout: 8 rows, {today}",
        "logs": "logs: 8 answers, week of 23 Nov",
        "gone": "gone",
    }
    profile = json.loads(found["heldout"].profile)
    assert (profile["num_rows"], profile["response_tokens"]) == (8, 80.0)
    columns = json.loads(found["heldout"].schema)["mlflow_colspec"]
    assert [(column["name"], column["type"]) for column in columns] == [("prompt_id", "string"), ("split", "string")]
    assert found["gone"].schema is None and found["gone"].digest == ("gone" * 9)[:36]


def test_a_lines_experiment_says_what_it_is_and_shows_the_headlines(tmp_path: Path, migrated: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes((migrated / "mlflow.db").read_bytes())
    line = Tracking(tmp_path, "my-line")
    for metrics in ({"tau.champion": 2.4, "cost.wall_s": 3.0}, {"tau.champion": 2.5}, {}):  # the last one failed
        (refresh := RefreshRun(line, "weekly", {})).open()
        refresh.close("FINISHED", metrics=metrics, name="1 Dec: current")
    _, experiment = line.connect()
    tags = client(line).get_experiment(experiment).tags
    view = tags["mlflow.sharedViewState.headlines"]
    assert json.loads(view) == {"selectedColumns": ["metrics.`cost.wall_s`", "metrics.`tau.champion`"]}
    for link in ("#/models/my-line", f"#/experiments/{experiment}/runs?viewStateShareKey=headlines"):
        assert f"({link})" in tags[NOTE]
    client(line).set_experiment_tag(experiment, NOTE, "ours")
    (refresh := RefreshRun(line, "weekly", {})).open()
    refresh.close("FINISHED", metrics={"tau.champion": 2.5})
    assert client(line).get_experiment(experiment).tags[NOTE] == "ours"
    runs = client(line).search_runs([experiment])
    assert {run.info.run_name for run in runs} == {"weekly", "1 Dec: current"}


def test_an_unfinished_run_of_the_same_key_is_resumed_without_repeating_steps(tracking: Tracking) -> None:
    first = tracking.stage_run(None, "sft", KEY)
    first.metrics(0, {"loss": 3.0})
    first.metrics(1, {"loss": 2.0})
    first.close("FAILED")
    parent = (refresh := RefreshRun(tracking, "again", {})).open()
    other = tracking.stage_run(parent, "sft", "cd" * 32)
    other.close("FINISHED")
    assert other.run_id != first.run_id
    second = tracking.stage_run(parent, "sft", KEY)
    assert (second.run_id, second.resumed) == (first.run_id, True)
    assert run_of(tracking, second.run_id).info.status == "RUNNING"
    for step in (1, 2):  # the stage resumed from its checkpoint
        second.metrics(step, {"loss": 2.0 - step})
    second.close("FINISHED")
    refresh.close("FINISHED")
    run = run_of(tracking, second.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent
    history = client(tracking).get_metric_history(second.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(0, 3.0), (1, 2.0), (2, 0.0)]


def test_two_processes_can_share_a_new_database(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from draftsmith.artifacts.tracking.refresh_runs import RefreshRun
        from draftsmith.artifacts.tracking.runs import Tracking
        tracking = Tracking(Path(sys.argv[1]))
        tracking.check()
        refresh = RefreshRun(tracking, sys.argv[2], {"a": 1})
        parent = refresh.open()
        run = tracking.stage_run(parent, "sft", sys.argv[2] * 64)
        for step in range(200):
            run.metrics(step, {"loss": 1.0})
        run.close("FINISHED")
        refresh.close("FINISHED")
        assert not tracking._warned
        """
    commands = [[sys.executable, "-c", textwrap.dedent(script), str(tmp_path), name] for name in "ab"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) for command in commands]
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    runs = all_runs(Tracking(tmp_path))
    assert len(runs) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert not (tmp_path / "mlruns").exists()


def test_a_database_of_an_older_mlflow_is_migrated(tmp_path: Path, migrated: Path) -> None:
    """The last migration is undone with MLflow's own scripts, then the database is opened again."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config

    (tmp_path / "mlflow.db").write_bytes((migrated / "mlflow.db").read_bytes())
    tracking = Tracking(tmp_path)
    command.downgrade(_get_alembic_config(tracking.uri), "-1")
    tracking.check()
    refresh = RefreshRun(tracking, "after", {})
    assert refresh.open() is not None
    refresh.close("FINISHED")


@pytest.fixture
def not_mlflow() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def silent() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("http://user:secret@127.0.0.1:{closed}", "refused"),
        ("{folder}/mlruns", ""),
        ("http://127.0.0.1:{not_mlflow}", ""),
        ("http://127.0.0.1:{silent}", "timed out"),
    ],
)
def test_an_unusable_tracking_uri_is_one_clear_error_within_seconds(
    uri: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, not_mlflow: int, silent: int
) -> None:
    places = {"closed": free_ports(1)[0], "folder": tmp_path, "not_mlflow": not_mlflow, "silent": silent}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(**places))
    started = time.monotonic()
    with pytest.raises(DraftsmithError, match=rf"MLFLOW_TRACKING_URI .*{why}.*unset it to use SQLite") as caught:
        Tracking(tmp_path).check()
    assert time.monotonic() - started < 15
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_locked_database_is_retryable(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def locked(_self: object, _name: str) -> None:  # the client's error after 20 s
        raise MlflowException("(sqlite3.OperationalError) database is locked")

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", locked)
    with pytest.raises(RetryableError, match=r"MLflow's database sqlite:.* is locked"):
        tracking.check()


def test_a_read_only_database_is_reported_before_the_work(
    tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is writable, but the file belongs to another user."""
    shutil.copy(migrated / "mlflow.db", tmp_path)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "mlflow.db" and access(path, mode))
    with pytest.raises(DraftsmithError, match=r"mlflow\.db is read-only"):
        Tracking(tmp_path).check()
    assert Tracking(tmp_path).connect()[0].search_registered_models() == []


def test_a_deleted_experiment_is_reported_before_the_work(tracking: Tracking) -> None:
    client, experiment = tracking.connect()
    client.delete_experiment(experiment)
    restore = rf"MLFLOW_TRACKING_URI=sqlite\S+ mlflow experiments restore --experiment-id {experiment}`"
    with pytest.raises(DraftsmithError, match=f"{tracking.experiment} is deleted.*{restore}"):
        Tracking(tracking.folder).check()
    assert Tracking(tracking.folder).connect()[1] == experiment, "lines can still be read"
    client.restore_experiment(experiment)
    Tracking(tracking.folder).check()


def test_a_moved_home_warns_that_files_go_to_the_old_one(migrated: Path, tmp_path: Path) -> None:
    assert describe_misplaced_files(Tracking(migrated)) is None
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(migrated / "mlflow.db", moved)
    warning = describe_misplaced_files(Tracking(moved))
    assert warning is not None and f"to {(migrated / 'mlartifacts' / 'draftsmith').as_uri()}, outside" in warning
    assert describe_misplaced_files(Tracking(moved, "a-new-one")) is None


def test_a_failure_during_the_work_is_one_warning_and_loses_nothing(
    tmp_path: Path, migrated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlflow.db").write_bytes((migrated / "mlflow.db").read_bytes())
    broken = Tracking(tmp_path)
    parent = (refresh := RefreshRun(broken, "r", {})).open()
    run = broken.stage_run(parent, "sft", KEY)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        for table in ("metrics", "latest_metrics", "tags", "runs"):
            database.execute(f"ALTER TABLE {table} RENAME TO gone_{table}")
    with caplog.at_level(logging.WARNING):
        run.metrics(0, {"loss": 1.0})
        run.close("FINISHED")
        later = broken.stage_run(parent, "opd", "cd" * 32)
        later.close("FINISHED")
        refresh.close("FINISHED")
    warnings = [record for record in caplog.records if record.name == "draftsmith.artifacts.tracking.runs"]
    assert len(warnings) == 1
    assert "Results are safe in the store" in warnings[0].getMessage()
    assert "no such table" in warnings[0].getMessage()
    assert not [record for record in caplog.records if record.name.startswith("mlflow")]  # and no traceback by MLflow


def test_metrics_are_sent_after_mlflow_is_back(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftsmith.artifacts.tracking.runs.FLUSH_S", -1.0)  # every step is due
    run = tracking.stage_run(None, "sft", KEY)
    run.metrics(0, {"loss": 3.0})
    client, _ = tracking.connect()
    with monkeypatch.context() as lost:
        lost.setattr(client, "log_batch", lambda *_a, **_k: (_ for _ in ()).throw(ConnectionError("gone")))
        run.metrics(1, {"loss": 2.0})
    run.metrics(2, {"loss": 1.0})  # not sent yet: the pause after a failure is a minute
    assert [metric.step for metric in client.get_metric_history(str(run.run_id), "train/loss")] == [0]
    run.close("FINISHED")
    history = client.get_metric_history(str(run.run_id), "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(0, 3), (1, 2), (2, 1)]
    assert run_of(tracking, run.run_id).info.status == "FINISHED"


def test_params_are_flat_and_within_mlflows_limits() -> None:
    inner = {"b": 1, "c": [1, "x"], "deep": {"er": {"est": 1}}}
    flat = flatten({"a": inner, "d": None, "e": "text", "f(g)": True, "long": "x" * 10_000})
    assert flat["a.b"] == "1"
    assert flat["a.c"] == '[1, "x"]'
    assert flat["a.deep"] == '{"er": {"est": 1}}'
    assert flat["d"] == "null"
    assert flat["e"] == "text"
    assert flat["f_g_"] == "true"
    assert len(flat["long"]) == 6000
    assert flat["long"].endswith("…")
    many = {"a": {f"field{number}": number for number in range(MOST_PARAMS)}, "b": 1}
    assert flatten(many) == {"a": json.dumps(many["a"]), "b": "1"}, "sections in place of too many fields"


def test_telemetry_is_off_and_the_import_is_lazy(tmp_path: Path) -> None:
    script = """
        import sys
        from draftsmith.artifacts.tracking.runs import Tracking
        assert "mlflow" not in sys.modules
        from pathlib import Path
        Tracking(Path(sys.argv[1])).check()
        from mlflow.telemetry.utils import is_telemetry_disabled
        assert is_telemetry_disabled()
        from mlflow.telemetry.client import get_telemetry_client
        assert get_telemetry_client() is None
        """
    give_databases(tmp_path / "home")
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "home")], check=True, timeout=120)


def test_a_run_ends_even_if_mlflow_refuses_its_files(
    tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a moved home, or with a server that cannot write to its bucket: metrics and tags are still set."""
    page = tmp_path / "report.html"
    page.write_text("a page")
    parent = (refresh := RefreshRun(tracking, "weekly", {})).open()
    run = tracking.stage_run(parent, "sft", KEY)
    client, _ = tracking.connect()
    monkeypatch.setattr(client, "log_artifact", lambda *_: (_ for _ in ()).throw(PermissionError("/home/old")))
    run.close("FINISHED", artifact(tmp_path / "made").path)
    refresh.close("FINISHED", metrics={"tau": 2.5}, files=[page], tags={"outcome": "promoted"})
    assert {run_of(tracking, each).info.status for each in (parent, run.run_id)} == {"FINISHED"}
    assert run_of(tracking, parent).data.metrics == {"tau": 2.5}
    assert run_of(tracking, parent).data.tags["outcome"] == "promoted"
