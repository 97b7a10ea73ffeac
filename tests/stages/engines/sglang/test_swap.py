"""A swap of several servers: what is checked before, the canary, a proof that fails, a rollback on a bad day."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError, RefusedError, RetryableError
from draftsmith.stages.engines.server_state import API_KEYS
from draftsmith.stages.engines.servers.state import NewDrafter
from draftsmith.stages.engines.sglang.protocol import Json
from draftsmith.stages.engines.swap import Served, Swap
from draftsmith.stages.replay.proof import Proof
from tests.stages.engines.http_server import HttpServer, Refusal, answer, serving
from tests.stages.engines.swaps import Prover, SwapServer, proof_of

OLD, NEW = "a" * 64, "b" * 64


@dataclass
class Fleet:
    """Servers and their addresses."""

    servers: list[SwapServer]
    http: list[HttpServer]
    recorded: list[Served] = field(default_factory=list)  # as a registry has it
    prover: Prover = field(default_factory=Prover)

    @property
    def urls(self) -> list[str]:
        return [each.url for each in self.http]

    @property
    def drafters(self) -> list[str]:
        return [each.drafter for each in self.servers]

    def swap(
        self,
        outcome: bool | None = True,
        prove: Callable[[], Proof] | None = None,
        to: str = NEW,
        *,
        named: bool = True,
    ) -> list[Served]:
        """Swap all servers; the proof has this outcome. Returns what they serve."""
        swap = self.prepared(outcome, prove, to, named=named)
        swap.swap(self.urls)
        return self.recorded

    def roll_back(self, outcome: bool | None = True, *, too_large: bool = False) -> list[Served]:
        """Roll all servers back. too_large: the target does not fit into the memory. Returns what they serve."""
        swap = self.prepared(outcome)
        self.prover.too_large = too_large
        swap.roll_back(self.urls)
        return self.recorded

    def prepared(
        self,
        outcome: bool | None = True,
        prove: Callable[[], Proof] | None = None,
        to: str = NEW,
        *,
        named: bool = True,
    ) -> Swap:
        self.prover = Prover(Proof(outcome, "3 of 9 verify steps are not the new drafter's."), prove)
        known, self.recorded = proof_of(self.recorded), []
        return Swap(NewDrafter(to, Path("/b"), "DFLASH", 8), self.prover, known, self.recorded.append, named)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with ExitStack() as stack:
        servers = [SwapServer(OLD), SwapServer(OLD)]
        http = [
            stack.enter_context(serving(answer, server_info=each.server_info, weights_checker=each.weights_checker))
            for each in servers
        ]
        yield Fleet(servers, http)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftsmith.stages.engines.sglang.swap._POLL_S", 0.01)


def test_the_servers_are_swapped_in_turn_and_each_proves_it(fleet: Fleet) -> None:
    fleet.servers[1].reading = True  # read before, by a command that was killed
    done = fleet.swap()
    assert [each.url for each in done] == fleet.prover.asked == fleet.urls
    assert {(each.drafter, each.pause_s) for each in done} == {(NEW, 0.5)}
    assert all("verify steps" in each.proof for each in done)
    assert fleet.drafters == [NEW, NEW]


def test_a_server_that_serves_it_is_left_and_one_that_restarted_is_swapped_again(fleet: Fleet) -> None:
    """What a server serves is asked, not remembered: after a restart it drafts with the folder of its options."""
    first = fleet.swap()[0]
    fleet.servers[1].drafter, fleet.servers[1].before = OLD, ""
    assert fleet.swap()[0] == first
    assert fleet.servers[0].writes == [NEW] and fleet.servers[1].writes == [NEW, NEW]
    assert fleet.prover.asked == [fleet.urls[1]]


def test_a_swap_that_ended_before_its_proof_is_proven_by_the_next_command(fleet: Fleet) -> None:
    fleet.servers[0].drafter, fleet.servers[0].before = NEW, OLD
    fleet.swap()
    assert not fleet.servers[0].writes and fleet.prover.asked == fleet.urls
    fleet.recorded = []
    with pytest.raises(RefusedError):
        fleet.swap(False)
    assert fleet.servers[0].writes == [OLD]


def test_a_proof_counts_by_the_registry_and_not_by_what_a_server_says(fleet: Fleet) -> None:
    """Anybody who reaches a server can make it say so."""
    server = fleet.servers[0]
    server.drafter, server.before, server.reports = NEW, OLD, {"proof": "0 of 99 verify steps are not the new ones."}
    fleet.swap()
    assert fleet.prover.asked == fleet.urls
    fleet.swap()
    assert fleet.prover.asked == []
    server.since = "2026-11-30T10:00:00+00:00"  # somebody wrote it once more
    fleet.swap()
    assert fleet.prover.asked == fleet.urls[:1]


@pytest.mark.parametrize("outcome", [False, None])
def test_a_failed_proof_of_the_canary_writes_the_old_weights_back(fleet: Fleet, outcome: bool | None) -> None:
    with pytest.raises(RefusedError, match="drafts with aaaaaaaaaaaa again"):
        fleet.swap(outcome)
    assert fleet.servers[0].writes == [NEW, OLD]
    assert not fleet.servers[1].writes and fleet.servers[1].drafter == OLD
    (served,) = fleet.recorded
    assert (served.drafter, served.since) == (OLD, fleet.servers[0].since) and "not proven" in served.proof
    fleet.swap(to=OLD)
    assert fleet.servers[0].writes == [NEW, OLD] and not fleet.prover.asked, "so the new one cannot come back"


@pytest.mark.parametrize("ending", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_proof_writes_the_old_weights_back(fleet: Fleet, ending: type[BaseException]) -> None:
    def prove() -> Proof:
        raise ending

    with pytest.raises(ending):
        fleet.swap(prove=prove)
    assert fleet.servers[0].writes == [NEW, OLD]


def test_a_lost_answer_to_the_write_writes_the_old_weights_back(fleet: Fleet) -> None:
    fleet.servers[0].loses = NEW
    with pytest.raises(RetryableError, match="drafts with aaaaaaaaaaaa again"):
        fleet.swap()
    assert fleet.servers[0].writes == [NEW, OLD] and fleet.drafters == [OLD, OLD]
    assert [each.drafter for each in fleet.recorded] == [OLD]


def test_if_the_old_weights_cannot_be_written_back_the_error_says_so(fleet: Fleet) -> None:
    def prove() -> Proof:
        fleet.http[0].stop()
        return Proof(False, "9 of 9 verify steps are not the new drafter's.")

    with pytest.raises(DraftsmithError, match="Whether it drafts with its old drafter aaaaaaaaaaaa is unknown"):
        fleet.swap(prove=prove)
    assert fleet.drafters == [NEW, OLD] and not fleet.recorded
    fleet.http[0].start()
    fleet.swap()
    assert fleet.prover.asked == fleet.urls, "the same command proves it"


def test_a_refused_write_leaves_the_server_as_it_was(fleet: Fleet) -> None:
    def refuse(_: Json) -> Json:
        raise Refusal(400, "no such file")

    fleet.http[0].replies["/weights_checker"] = refuse
    with pytest.raises(DraftsmithError, match=r"refuses the drafter.* drafts with aaaaaaaaaaaa again"):
        fleet.swap()
    assert fleet.http[0].count("/weights_checker") == 1 and not fleet.recorded


def test_a_later_plugin_may_report_more(fleet: Fleet) -> None:
    fleet.servers[0].reports = {"v": 7, "canary": {"drafter": 3}}
    fleet.swap()
    assert fleet.drafters == [NEW, NEW]


@pytest.mark.parametrize(
    "reports",
    [{"v": 7, "drafter": {"digest": OLD}}, {"v": 7, "since": None}, {"drafter": "../.."}, {"since": "<b>now</b>"}],
)
def test_a_state_that_cannot_be_read_is_refused_before_anything_is_written(fleet: Fleet, reports: Json) -> None:
    fleet.servers[1].reports = reports
    version = reports.get("v", 1)
    with pytest.raises(DraftsmithError, match=rf"{fleet.urls[1]}: .*plug-in \(version {version}, here 1\)"):
        fleet.swap()
    assert not fleet.servers[0].writes


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


def test_a_server_that_only_a_tag_names_gets_no_key(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in API_KEYS.values():
        monkeypatch.setenv(variable, "key of the fleet")
    fleet.swap(named=False)
    assert fleet.drafters == [NEW, NEW] and not [http.keys for http in fleet.http if http.keys]
    fleet.swap(to=OLD)
    assert {key for http in fleet.http for key in http.keys} == {"Bearer key of the fleet"}


def test_a_rollback_swaps_the_servers_that_answer_and_reports_the_others(fleet: Fleet) -> None:
    fleet.http[0].stop()
    with pytest.raises(RetryableError, match=fleet.urls[0]) as error:
        fleet.roll_back()
    assert fleet.urls[1] not in str(error.value)
    assert fleet.drafters == [OLD, NEW] and fleet.recorded[-1].proof


@pytest.mark.parametrize("outcome", [False, None])
def test_a_rollback_is_not_written_back(fleet: Fleet, outcome: bool | None) -> None:
    with pytest.raises(RefusedError) as error:
        fleet.roll_back(outcome)
    assert fleet.drafters == [NEW, NEW] and all(url in str(error.value) for url in fleet.urls)
    assert str(error.value).endswith(f"{', '.join(fleet.urls)}: it is written, and not proven.")
    assert {each.proof for each in fleet.recorded} == {""}


def test_a_rollback_writes_first_and_needs_the_targets_memory_only_then(fleet: Fleet) -> None:
    with pytest.raises(DraftsmithError, match=r"16 GB where 3 GB are free.*written, and not proven"):
        fleet.roll_back(too_large=True)
    assert fleet.drafters == [NEW, NEW]
    fleet.roll_back()
    assert [server.writes for server in fleet.servers] == [[NEW], [NEW]] and fleet.prover.asked == fleet.urls


def test_a_swap_needs_the_targets_memory_before_anything_is_written(fleet: Fleet) -> None:
    swap = fleet.prepared()
    fleet.prover.too_large = True
    with pytest.raises(DraftsmithError, match="3 GB are free"):
        swap.swap(fleet.urls)
    assert fleet.drafters == [OLD, OLD]
