"""Swaps and rollbacks of a line's servers: which the registry knows, which get a key, and a bad day."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.tracking.refresh_runs import RefreshRun
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.cli.main import main
from draftsmith.flows.refresh.champion import resolve
from draftsmith.flows.refresh.swap import served_by, swapped_servers
from draftsmith.flows.refresh.versions import registry
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.server_state import API_KEYS
from draftsmith.stages.engines.servers.requirements import served_block_size
from tests.flows.refresh.line_runs import checked, config_of, finished, gated, serving
from tests.stages.engines.http_server import HttpServer, answer
from tests.stages.engines.http_server import serving as http_server
from tests.stages.engines.swaps import SwapServer

KEY = "key-of-the-fleet"


@dataclass(frozen=True)
class Line:
    """A line whose second version is the champion, and a server that was started with it."""

    name: str
    digests: list[str]
    server: SwapServer
    http: HttpServer

    def served_by(self, number: int) -> list[str]:
        return [served.url for served in served_by(registry().version(self.name, number))]

    @contextmanager
    def another(self) -> Iterator[HttpServer]:
        """Run one more server with the champion, which the line does not know yet."""
        with serving_swaps(SwapServer(self.digests[1], self.server.block_size)) as http:
            yield http


@contextmanager
def serving_swaps(server: SwapServer) -> Iterator[HttpServer]:
    with http_server(answer, server_info=server.server_info, weights_checker=server.weights_checker) as http:
        yield http


@pytest.fixture(params=[False], ids=["store"])
def of_two(request: pytest.FixtureRequest, line: str, home: Path, drafters: list[Artifact]) -> Iterator[Line]:
    """A parameter: whether its drafters are uploaded."""
    config = config_of(line, registry={"name": line, "upload": request.param})
    checkpoints = [drafter.path / DRAFTER_FOLDER for drafter in drafters]
    for drafter in drafters:
        refresh = RefreshRun(Tracking(home), "weekly", {})
        finished(config, gated(Store(home / "store"), drafter), refresh.open() if request.param else None)
        refresh.close("FINISHED")
    digests = [drafter_digest(each) for each in checkpoints]
    server = SwapServer(digests[1], served_block_size(checkpoints[1], DraftingConfig(), "DFLASH"))
    with serving_swaps(server) as http:
        assert main(["swap", line, "--url", http.url]) == 0, "it was started with it, so there is nothing to prove"
        yield Line(line, digests, server, http)


def test_keys_go_to_servers_that_somebody_named_and_not_to_those_of_tags(
    of_two: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write tags in MLflow would read the key."""
    for variable in API_KEYS.values():
        monkeypatch.setenv(variable, KEY)
    name, http = of_two.name, of_two.http
    for words in (["status", name], ["watch", name, "--minutes", "0"], ["swap", name], ["rollback", name]):
        main(words)
    assert http.count("/server_info") > 4 and of_two.server.drafter == of_two.digests[0]
    assert http.keys == []
    for words in (["status", name], ["watch", name, "--minutes", "0"], ["swap", name]):
        http.keys.clear()
        main([*words, "--url", http.url])
        assert set(http.keys) == {f"Bearer {KEY}"}, words


@pytest.mark.parametrize(
    "address", ["http://user:the-password@{host}", "http://{host}/?api_key=the-password", "file:{host}"]
)
def test_an_address_that_is_none_or_has_a_password_is_refused_wherever_it_comes_from(
    of_two: Line, address: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    name, lines = of_two.name, registry()
    with http_server(answer) as elsewhere:
        url = address.format(host=elsewhere.url.partition("//")[2])
        served = {"url": url, "drafter": of_two.digests[1], "since": "", "pause_s": 0.0, "proof": "It was proven."}
        lines.tag(lines.version(name, 2), {"server.elsewhere": json.dumps(served)})
        assert swapped_servers(name) == [of_two.http.url]
        assert main(["status", name]) == main(["champions", name]) == 0
        for words in (["status"], ["watch"], ["swap"], ["rollback"]):
            assert main([*words, name, "--url", url]) == 2
        assert not elsewhere.asked and serving(name) == 2
    shown = capsys.readouterr()
    assert "the-password" not in shown.out + shown.err + caplog.text
    assert "its tag draftsmith.server.elsewhere is ignored" in caplog.text


def test_a_later_release_may_store_more_of_a_server(of_two: Line) -> None:
    (name,) = (tag for tag in registry().version(of_two.name, 2).tags if tag.startswith("server."))
    version = registry().version(of_two.name, 2)
    registry().tag(version, {name: json.dumps({**json.loads(version.tags[name]), "canary": True})})
    assert of_two.served_by(2) == [of_two.http.url]


def test_a_champion_that_is_damaged_on_disk_is_not_written(of_two: Line, home: Path, drafters: list[Artifact]) -> None:
    """By a run: the commands compare every checksum first."""
    weights = drafters[1].path / DRAFTER_FOLDER / "model.safetensors"
    weights.chmod(0o600)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    of_two.server.drafter = of_two.digests[0]  # it was started again with another folder
    config = config_of(of_two.name, registry={"name": of_two.name, "servers": [of_two.http.url]})
    ended = checked(resolve(config), home)
    assert ended is not None and ended.name == "Unserved" and "is not the drafter that was registered" in ended.message
    assert not of_two.http.count("/weights_checker")


def test_a_rollback_on_a_bad_day(of_two: Line, capsys: pytest.CaptureFixture[str]) -> None:
    """One server is dead, and the proof's target and answers are gone: the others are written, and all is reported."""
    name = of_two.name
    with of_two.another() as dead:
        assert main(["swap", name, "--url", dead.url]) == 0
    assert of_two.served_by(2) == [of_two.http.url, dead.url]
    capsys.readouterr()
    assert main(["rollback", name]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"engine: {dead.url} cannot be reached" in said and "which the proof needs, are not in the store" in said
    assert f"{of_two.http.url}: it is written, and not proven" in said
    assert f"run `draftsmith swap {name}` (`draftsmith swap {name} --forget URL` drops a server that is gone)" in said
    assert serving(name) == 1 and of_two.server.drafter == of_two.digests[0]
    assert (of_two.served_by(1), of_two.served_by(2)) == ([of_two.http.url], [dead.url])

    assert main(["swap", name, "--forget", "http://nowhere:1"]) == 2
    assert main(["swap", name, "--forget", dead.url]) == 0
    assert swapped_servers(name) == [of_two.http.url]
    capsys.readouterr()
    assert main(["swap", name]) == 2, "it is not proven yet"
    assert dead.url not in capsys.readouterr().err
    assert of_two.server.writes == of_two.digests[:1], "the version that was rolled back is not written again"


@pytest.mark.parametrize("of_two", [True], ids=["upload"], indirect=True)
def test_a_rollback_needs_only_the_upload(of_two: Line, home: Path) -> None:
    shutil.rmtree(home / "store")
    assert main(["rollback", of_two.name]) == 2, "it is not proven"
    assert serving(of_two.name) == 1 and of_two.server.drafter == of_two.digests[0]
    asked = [json.loads(body["action"].partition(":")[2]) for path, body in of_two.http.asked if "weights" in path]
    assert {each["upload"] for each in asked} == {registry().version(of_two.name, 1).uploaded}
    assert Tracking(home).uri not in json.dumps(asked), "it may hold a password: servers use their own"


def test_a_write_that_the_registry_does_not_know_is_not_proven(of_two: Line) -> None:
    """Whatever the server says of it."""
    of_two.server.before, of_two.server.since = of_two.digests[0], "2026-12-01T08:00:00+00:00"
    of_two.server.reports = {"proof": "0 of 99 verify steps are not the new drafter's."}
    assert main(["swap", of_two.name]) == 2, "a proof is due, whose target is not in the store"
