"""A swap of several servers: what is checked before, the canary, and what happens if a proof fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError, RefusedError, RetryableError
from draftsmith.stages.engines.served import API_KEYS
from draftsmith.stages.engines.servers.state import NewDrafter, ServerState
from draftsmith.stages.engines.sglang.protocol import SWAP_ACTION, SWAP_STATE, Json
from draftsmith.stages.engines.swap import Prove, Served, swap_servers
from draftsmith.stages.replay.proof import Proof
from tests.stages.engines.http_server import HttpServer, answer, serving

OLD, NEW, SINCE = "a" * 64, "b" * 64, "2026-11-30T08:00:00+00:00"


@dataclass
class StandIn:
    """A server with our plug-in, which needs two requests to read a drafter."""

    drafter: str = OLD
    before: str = ""
    proof: str = ""
    writes: list[str] = field(default_factory=list)
    reading: bool = False

    def server_info(self, _: Json) -> Json:
        served = {"drafter": self.drafter, "since": SINCE, "before": self.before, "pause_s": 0.5, "proof": self.proof}
        state = {SWAP_STATE: served}
        drafting = {"speculative_algorithm": "DFLASH", "speculative_num_draft_tokens": 8}
        return {"version": "0.5.23", "dtype": "float32", **drafting, "internal_states": [state]}

    def weights_checker(self, payload: Json) -> Json:
        wanted = json.loads(payload["action"].removeprefix(SWAP_ACTION))
        self.reading = not self.reading and wanted["drafter"] != self.drafter
        if self.reading:
            return {"success": True, "message": json.dumps({"state": "reading"})}
        if wanted["drafter"] != self.drafter:
            self.before, self.drafter, self.proof = self.drafter, wanted["drafter"], ""
            self.writes.append(self.drafter)
        self.proof = wanted["proof"] or self.proof
        message = {"state": "served", "since": "2026-11-30T09:00:00+00:00", "pause_s": 0.5}
        return {"success": True, "message": json.dumps(message)}


@dataclass
class Fleet:
    """Servers and their addresses."""

    servers: list[StandIn]
    http: list[HttpServer]

    @property
    def urls(self) -> list[str]:
        return [each.url for each in self.http]

    def swap(self, outcome: bool | None = True, prove: Prove | None = None) -> list[Served]:
        """Swap all servers; the proof has this outcome. Returns what they serve."""
        done: list[Served] = []
        proof = Proof(outcome, "3 of 9 verify steps are not the new drafter's.")
        new = NewDrafter(NEW, Path("b"), "DFLASH", 8)
        swap_servers(self.urls, new, lambda _before: prove or (lambda: proof), done.append)
        return done


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with ExitStack() as stack:
        servers = [StandIn(), StandIn()]
        http = [
            stack.enter_context(serving(answer, server_info=each.server_info, weights_checker=each.weights_checker))
            for each in servers
        ]
        yield Fleet(servers, http)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftsmith.stages.engines.sglang.served._POLL_S", 0.01)


def test_the_servers_are_swapped_in_turn_and_each_proves_it(fleet: Fleet) -> None:
    fleet.servers[1].reading = True  # read before, by a command that was killed
    done = fleet.swap()
    assert [each.url for each in done] == fleet.urls
    assert {(each.drafter, each.pause_s) for each in done} == {(NEW, 0.5)}
    assert all("verify steps" in each.proof for each in done)
    assert [server.drafter for server in fleet.servers] == [NEW, NEW]


def test_a_server_that_serves_it_is_left_and_one_that_restarted_is_swapped_again(fleet: Fleet) -> None:
    """What a server serves is asked, not remembered: after a restart it drafts with the folder of its options."""
    done = fleet.swap()
    fleet.servers[1].drafter = OLD
    assert fleet.swap()[0] == replace(done[0], since=SINCE), "as it reports"
    assert fleet.servers[0].writes == [NEW] and fleet.servers[1].writes == [NEW, NEW]


def test_a_swap_that_ended_before_its_proof_is_proven_by_the_next_command(fleet: Fleet) -> None:
    fleet.servers[0].drafter, fleet.servers[0].before = NEW, OLD
    fleet.swap()
    assert not fleet.servers[0].writes and fleet.servers[0].proof
    fleet.servers[0].proof = ""
    with pytest.raises(RefusedError):
        fleet.swap(False)
    assert fleet.servers[0].writes == [OLD]


@pytest.mark.parametrize("outcome", [False, None])
def test_a_failed_proof_of_the_canary_writes_the_old_weights_back(fleet: Fleet, outcome: bool | None) -> None:
    with pytest.raises(RefusedError, match="drafts with aaaaaaaaaaaa again"):
        fleet.swap(outcome)
    assert fleet.servers[0].writes == [NEW, OLD]
    assert not fleet.servers[1].writes and fleet.servers[1].drafter == OLD
    swap_servers(fleet.urls, NewDrafter(OLD, Path("a"), "DFLASH", 8), _no_proof, lambda _: None)
    assert fleet.servers[0].writes == [NEW, OLD], "it serves the old one already, so the new one cannot come back"


def _no_proof(before: ServerState) -> Prove:
    raise AssertionError(f"{before.url} is swapped")


def test_an_interrupted_proof_writes_the_old_weights_back(fleet: Fleet) -> None:
    def prove() -> Proof:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fleet.swap(prove=prove)
    assert fleet.servers[0].writes == [NEW, OLD]


@pytest.mark.parametrize(
    "says",
    [
        {"internal_states": [{}]},  # without our plug-in
        {"speculative_algorithm": "EAGLE3"},
        {"speculative_num_draft_tokens": 16},
        {"speculative_algorithm": None},
    ],
)
def test_a_server_that_cannot_take_it_is_refused_before_any_is_written(fleet: Fleet, says: Json) -> None:
    fleet.http[1].replies["/server_info"] = lambda payload: fleet.servers[1].server_info(payload) | says
    with pytest.raises(DraftsmithError, match=fleet.urls[1]) as refused:
        fleet.swap()
    assert not isinstance(refused.value, RetryableError)
    assert not any(http.count("/weights_checker") for http in fleet.http)


def test_a_server_that_does_not_answer_is_worth_a_retry(fleet: Fleet) -> None:
    fleet.http[1].stop()
    with pytest.raises(RetryableError, match=fleet.urls[1]):
        fleet.swap()
    assert not fleet.servers[0].writes


def test_a_server_with_a_key_names_its_variable(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.http[0].api_key = "key"
    monkeypatch.setenv(API_KEYS["vllm"], "key")
    with pytest.raises(DraftsmithError, match=API_KEYS["sglang"]):
        fleet.swap()
    monkeypatch.setenv(API_KEYS["sglang"], "key")
    fleet.swap()
