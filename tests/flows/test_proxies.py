"""Servers of Prefect, MLflow and SGLang on this machine are reached without the proxy of the environment."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from draftsmith.artifacts.host import bypass_proxy_for_localhost
from draftsmith.flows.cli.main import main


@pytest.fixture(autouse=True)
def _unreachable_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(each, "")  # restored after the test
        monkeypatch.delenv(each)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


@pytest.mark.parametrize(("name", "known"), [("no_proxy", "corp.internal"), ("NO_PROXY", "*"), ("no_proxy", None)])
def test_localhost_is_reached_without_the_proxy_and_exclusions_stay(
    monkeypatch: pytest.MonkeyPatch, name: str, known: str | None
) -> None:
    if known is not None:
        monkeypatch.setenv(name, known)
    bypass_proxy_for_localhost()
    for host in ("127.0.0.1", "localhost", *([known] if known and known != "*" else [])):
        assert urllib.request.proxy_bypass(host), host
    assert bool(urllib.request.proxy_bypass("gpu1.elsewhere")) == (known == "*")


def test_every_command_reaches_localhost_without_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path))
    assert not urllib.request.proxy_bypass("127.0.0.1")
    assert main(["status"]) == 0
    assert urllib.request.proxy_bypass("127.0.0.1")
    assert not urllib.request.proxy_bypass("gpu1.elsewhere")
