"""`draftsmith status` and `draftsmith watch` on real servers of a line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.tracking.registry import Version
from draftsmith.flows.cli.main import main
from draftsmith.flows.refresh.line import registry
from draftsmith.stages.drafters.digest import drafter_digest
from tests.sglang_cpu.fixtures import ServingTarget
from tests.sglang_cpu.server import generate
from tests.testbed.artifacts import committed

pytestmark = [pytest.mark.sglang, pytest.mark.integration]

REQUEST = {"input_ids": [5, 6, 7, 8], "sampling_params": {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Store(tmp_path / "home" / "store")


def promoted(store: Store, key: str, digest: str, tau: float) -> Version:
    """Make a version of line `tiny` the champion. tau: what it was promoted with."""
    metrics = {"all": {"tau": tau, "low": tau - 0.05, "high": tau + 0.05, "prompts": 100}}
    tags = {"drafter_digest": digest, "figures": json.dumps(metrics), "tau": str(tau)}
    tags["measured_with"] = json.dumps({"drafting.block_size": 8})
    lines, drafter = registry(), committed(store, "opd", {"drafter/config.json": key}, key)
    version = lines.register("tiny", drafter, tags)
    lines.promote(version, expected=lines.champion("tiny"), why="a test")
    return version


@contextmanager
def load(url: str) -> Iterator[None]:
    """Send requests, four at a time, while the block runs."""
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            generate(url, [REQUEST] * 8)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        ended.set()
        sender.join()


def test_a_line_is_watched_and_rolled_back(
    dflash_url: str, plain_url: str, serving_target: ServingTarget, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    (answer,) = generate(dflash_url, [REQUEST])
    tau = (answer["meta_info"]["completion_tokens"] - 1) / answer["meta_info"]["spec_verify_ct"]
    digest, watch = drafter_digest(serving_target.drafter), ["watch", "tiny", "--url", dflash_url, "--minutes", "0.06"]

    first = promoted(store, "a", digest, tau)
    assert main(["status", "tiny", "--url", dflash_url, "--url", plain_url]) == 0
    shown = capsys.readouterr().out
    assert "version 1 (champion)" in shown and first.content_id[:12] in shown and "no drafter" in shown
    assert main(watch) == 0
    assert "inconclusive" in capsys.readouterr().out, "no request finished"
    with load(dflash_url):
        assert main(watch) == 0
    assert f"promised: tiny version 1: tau {tau:.3f}" in capsys.readouterr().out

    promoted(store, "b", "0" * 64, tau)
    assert main(watch) == 3
    assert "version 1" in capsys.readouterr().err, "the server has the drafter before"

    promoted(store, "c", digest, 1.5 * tau)
    assert main([*watch, "--then", "refresh"]) == 2, "a line's name is no config"
    with load(dflash_url):
        assert main(watch) == 3
        assert main([*watch, "--then", "rollback"]) == 0
    champion = registry().champion("tiny")
    assert champion is not None and champion.number == 2


def test_what_cannot_be_asked_is_an_error(plain_url: str, store: Store) -> None:
    assert main(["status", "tiny", "--url", plain_url]) == 2, "no such line"
    promoted(store, "a", "0" * 64, 2.0)
    assert main(["status", "tiny"]) == 2, "no server"
    assert main(["status", "tiny", "--url", "http://127.0.0.1:9"]) == 0
    assert main(["watch", "tiny", "--url", "http://127.0.0.1:9"]) == 75
    assert main(["watch", "tiny", "--url", plain_url]) == 3, "it has no drafter"
