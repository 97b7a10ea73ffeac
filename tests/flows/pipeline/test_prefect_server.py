"""A proxy in the environment, and the exclusions that the user has set."""

from __future__ import annotations

import urllib.request

import pytest

from draftsmith.flows.pipeline.prefect_server import _reach_ourselves_directly


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
@pytest.mark.parametrize("known", ["corp.internal", "*", None])
def test_our_own_server_is_reached_directly_and_exclusions_stay(
    monkeypatch: pytest.MonkeyPatch, name: str, known: str | None
) -> None:
    for each in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(each, "")  # put back after the test
        monkeypatch.delenv(each)
    if known is not None:
        monkeypatch.setenv(name, known)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    _reach_ourselves_directly()
    for host in ("127.0.0.1", "localhost", *([known] if known and known != "*" else [])):
        assert urllib.request.proxy_bypass(host), host
    assert bool(urllib.request.proxy_bypass("gpu1.elsewhere")) == (known == "*")
