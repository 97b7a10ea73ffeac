"""`draftsmith status` and `draftsmith watch` on real servers of a line."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from draftsmith.flows.cli.main import main
from draftsmith.stages.data.trajectories import load_prompts
from draftsmith.stages.drafters.digest import drafter_digest
from tests.flows.refresh.watched import promoted
from tests.sglang_cpu.fixtures import ServingTarget
from tests.sglang_cpu.server import generate
from tests.testbed.drafter import DrafterArtifacts

pytestmark = [pytest.mark.sglang, pytest.mark.integration]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@contextmanager
def load(url: str, request: dict[str, Any]) -> Iterator[None]:
    """Send one request after the other while the block runs."""
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            generate(url, [request])

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        ended.set()
        sender.join()


def test_the_servers_of_a_line_are_watched(
    dflash_url: str,
    plain_url: str,
    serving_target: ServingTarget,
    tiny_drafter: DrafterArtifacts,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt = load_prompts(tiny_drafter.prompts, ["heldout"])[0].token_ids
    request = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}}
    (answer,) = generate(dflash_url, [request])
    tau = (answer["meta_info"]["completion_tokens"] - 1) / answer["meta_info"]["spec_verify_ct"]
    digest, watch = drafter_digest(serving_target.drafter), ["watch", "tiny", "--url", dflash_url, "--minutes"]

    first = promoted("tiny", "a", digest, tau)
    assert main(["status", "tiny", "--url", dflash_url, "--url", plain_url]) == 0
    shown = capsys.readouterr().out
    assert "version 1 (champion)" in shown and first.content_id[:12] in shown and "no drafter" in shown
    assert re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d", shown), "since when"
    assert main([*watch, "0"]) == 0
    assert "inconclusive" in capsys.readouterr().out, "no request finished"
    with load(dflash_url, request):
        assert main([*watch, "0.08", "--url", "http://127.0.0.1:9"]) == 0
    shown = capsys.readouterr().out
    assert f"promised: tiny version 1: tau {tau:.3f}" in shown and "no answer from http://127.0.0.1:9" in shown

    promoted("tiny", "b", "0" * 64, tau)
    assert main([*watch, "9"]) == 3
    assert "version 1" in capsys.readouterr().err, "the server has the drafter before"

    promoted("tiny", "c", digest, 1.5 * tau)
    assert main([*watch, "9", "--then", "refresh"]) == 2, "a line's name is no config"
    with load(dflash_url, request):
        assert main([*watch, "0.08"]) == 3
    assert "measurably more than" in capsys.readouterr().err


def test_what_cannot_be_asked_is_an_error(plain_url: str) -> None:
    assert main(["status", "tiny", "--url", plain_url]) == 2, "no such line"
    promoted("tiny", "a", "0" * 64, 2.0)
    assert main(["status", "tiny"]) == 2, "no server was swapped"
    assert main(["status", "tiny", "--url", "http://127.0.0.1:9"]) == 0
    assert main(["watch", "tiny", "--url", "http://127.0.0.1:9"]) == 75
    assert main(["watch", "tiny", "--url", plain_url]) == 3, "it has no drafter"
