"""The `draftsmith` command without a flow: help, errors of one line, single stages, status, show."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import EXIT_RETRYABLE
from draftsmith.flows.cli.main import main, parser
from draftsmith.flows.refresh.measurements import DIAGNOSIS
from tests.flows.processes import ROOT, assert_gone, pid_in, processes_of, run_toy, toy_command, wait_until
from tests.flows.toy import TOY, write_config


def saved_numbers(home: Path) -> int:
    files = list(home.glob("store/collect/.partial-*/work/saved.json"))
    return len(json.loads(files[0].read_text() or "[]")) if files else 0


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import draftsmith", {"torch", "prefect", "mlflow", "transformers", "pandas", "numpy"}),
        (
            "import draftsmith.flows.cli.main as cli; cli.main(['--help'])",
            {"torch", "prefect", "mlflow", "pydantic", "rich", "pyarrow"},
        ),
        (
            "import draftsmith.flows.refresh.graph",
            {"torch", "transformers", "scipy.stats", "prefect", "mlflow", "datasets"},
        ),
    ],
    ids=["the package", "help", "a plan"],
)
def test_nothing_heavy_is_imported_early(code: str, heavy: set[str]) -> None:
    source = f"import atexit, sys; atexit.register(lambda: print(sorted({heavy} & set(sys.modules)))); {code}"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and ("help" not in code or "champions" in done.stdout)


def test_an_unreachable_mlflow_is_reported_before_the_work(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["stage", "target", str(write_config(tmp_path / "toy.yaml"))], TOY) == EXIT_RETRYABLE
    assert "MLFLOW_TRACKING_URI http://127.0.0.1:9" in capsys.readouterr().err
    assert not list(home.glob("store/*/*"))


def test_a_plan_changes_nothing(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(write_config(tmp_path / "toy.yaml")), "--plan"], TOY) == 0
    assert "after left, right" in capsys.readouterr().out
    assert not home.exists()


@pytest.mark.usefixtures("home")
def test_single_stages_take_their_inputs_from_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(tmp_path / "toy.yaml"))
    assert main(["stage", "left", config, "--set", "target.count=3"], TOY) == 2
    err = capsys.readouterr().err
    assert "stage left: target: not in the store" in err and "`draftsmith stage target CONFIG`" in err

    assert main(["stage", "target", config, "--set", "target.count=3"], TOY) == 0
    assert main(["stage", "total", config, "--set", "target.count=3"], TOY) == 2
    assert "stage total: left, right: not in the store" in capsys.readouterr().err
    assert main(["stage", "left", config, "--set", "target.count=3"], TOY) == 0
    assert "left: done" in capsys.readouterr().out
    assert main(["stage", "left", config, "--set", "target.count=3"], TOY) == 0
    assert "left: reused" in capsys.readouterr().out
    assert main(["stage", "lfet", config], TOY) == 2
    assert "stage lfet: no such node. Use one of: target, left, right, total" in capsys.readouterr().err

    assert main(["status", config, "--set", "target.count=3"], TOY) == 0
    states = {line.split()[0]: line.split()[3:] for line in capsys.readouterr().out.splitlines()}
    assert states["target"] == states["left"] == ["done"]
    assert states["right"] == ["to", "do"]
    assert states["total"] == ["waits", "for", "right"]

    assert main(["show", "combine", "--verify"], TOY) == 0
    shown = capsys.readouterr().out
    assert "every checksum is right" in shown
    assert "first: collect/" in shown
    assert "numbers.json" in shown
    assert "total=3" in shown


def test_a_damaged_artifact_is_shown_and_rebuilt_alone(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path / "toy.yaml"))
    for node in ("target", "left"):
        assert main(["stage", node, config], TOY) == 0
    (left,) = home.glob("store/combine/[!.]*")
    for file, content in (("numbers.json", "["), ("manifest.json", "["), ("manifest.json", None)):
        (left / file).unlink() if content is None else (left / file).write_text(content)
        capsys.readouterr()
        assert main(["status", config], TOY) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "damaged: " in shown and "--force left" in shown
        assert main(["status"], TOY) == 0
        of_store = " ".join(capsys.readouterr().out.split())
        assert ("damaged: " in of_store) == (file == "numbers.json"), "one without a manifest is not listed"
        assert main(["stage", "total", config], TOY) == 2
        assert str(left) in capsys.readouterr().err
        assert main(["stage", "left", config], TOY) == 2
        assert main(["stage", "left", config, "--force"], TOY) == 0
        assert main(["stage", "left", config], TOY) == 0
        assert "left: reused" in capsys.readouterr().out


def test_an_unexpected_error_is_one_line_and_a_traceback_only_on_request(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["stage", "target", str(write_config(tmp_path / "toy.yaml", target={"count": -1, "seconds_each": 0}))]
    (home / "store").mkdir(parents=True)
    (home / "store" / "collect").touch()  # a file in place of a folder
    assert main(arguments, TOY) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("DRAFTSMITH_DEBUG", "1")
    main(arguments, TOY)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.integration
def test_no_process_outlives_the_command(tmp_path: Path) -> None:
    """By SIGTERM. SIGINT and SIGKILL of a whole run: `orchestration/test_run.py`."""
    home, worker_file = tmp_path / "home", tmp_path / "worker"
    target = {"count": 40, "seconds_each": 0.05, "worker": str(worker_file)}
    config = write_config(tmp_path / "toy.yaml", target=target)
    command = toy_command(home, "stage", "target", config)
    worker = pid_in(worker_file)
    wait_until(lambda: saved_numbers(home) > 3, "some numbers are saved")
    (note,) = home.glob("store/collect/.partial-*/attempt.json")
    assert json.loads(note.read_text())["pid"] == command.pid
    os.kill(command.pid, signal.SIGTERM)
    _, err = command.communicate(timeout=120)
    assert command.returncode == 143
    assert_gone(worker)
    wait_until(lambda: not processes_of(home), "no process of this home is left", limit_s=30)
    logs = "".join(path.read_text() for path in (home / "logs").glob("*.log"))
    assert "Run the same command again to continue" in err
    assert "StageInterrupted" in logs

    saved = saved_numbers(home)
    again = run_toy(home, "stage", "target", config)
    assert again.returncode == 0, again.stderr
    assert f"going on from {saved}" in again.stdout


def test_a_second_interrupt_ends_the_command_immediately_and_silently(tmp_path: Path) -> None:
    """Prefect may still send events at the interpreter's exit."""
    code = (
        "import atexit, sys, time; from draftsmith.flows.cli import commands, main as cli\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        "commands.COMMANDS['status'] = interrupted\n"
        "atexit.register(time.sleep, 60)\n"
        "sys.exit(cli.main(['status']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "DRAFTSMITH_HOME": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as command:
        assert command.stderr is not None
        assert command.stderr.readline().startswith("draftsmith: error: interrupted.")
        command.send_signal(signal.SIGINT)
        assert command.wait(20) == 130 and command.stderr.read() == ""


def test_a_diagnosis_is_made_anew_by_every_command() -> None:
    """The server may answer differently from last time."""
    words = ["diagnose", "--url", "http://localhost:30000", "--drafter", "line@champion", "line.yaml"]
    assert parser().parse_args(words).force == [DIAGNOSIS]
    assert parser().parse_args([*words, "--force", "target"]).force == [DIAGNOSIS, "target"]
