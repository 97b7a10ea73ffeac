"""A swap by vLLM's update of draft weights, on a stand-in: what the server is asked, and what it reports afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError, RefusedError, RetryableError
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.server_state import API_KEYS, ask_servers, count_finished
from draftsmith.stages.engines.servers.state import NewDrafter, ServerState
from draftsmith.stages.engines.swap import Served, Swap
from draftsmith.stages.engines.swap_proof import ReplayProver
from draftsmith.stages.engines.vllm.plugin import BACKEND
from draftsmith.stages.replay.proof import Proof
from tests.stages.drafters.edits import Edit, with_another_mask, without_a_layer
from tests.stages.engines.http_server import HttpServer, Refusal, serving
from tests.stages.engines.swaps import Prover, proof_of
from tests.testbed.drafter import DrafterArtifacts

OLD, NEW = "a" * 64, "b" * 64


@dataclass
class StandIn:
    """A vLLM server in development mode, with our backend."""

    started_with: Path
    version: str = "default"
    method: str = "dflash"
    target: Path = Path("/target")
    writes: list[str] = field(default_factory=list)
    active: bool = False  # an update has begun
    broken: str = ""  # a call that is refused
    loses: str = ""  # its answer after it wrote this drafter
    recorded: list[Served] = field(default_factory=list)  # as a registry has it
    steps: int = 0
    http: HttpServer | None = None

    @property
    def url(self) -> str:
        assert self.http is not None
        return self.http.url

    def replies(self) -> dict[str, Any]:
        return {
            "version": lambda _: {"version": "0.32.0"},
            "metrics": lambda _: self.metrics(),
            "weight_info": lambda _: {"weight_version": self.version},
            "server_info?config_format=json": lambda _: {"vllm_config": self.options()},
            "update_weight_version": lambda body: self.name(body["new_version"]),
            "start_draft_weight_update": lambda _: self.begin(),
            "update_weights": lambda body: self.write(body["update_info"]),
            "finish_weight_update": lambda body: self.finish(body.get("weight_version")),
            "reset_prefix_cache?reset_running_requests=true": lambda _: {},
        }

    def options(self) -> dict[str, Any]:
        return {
            "model_config": {"dtype": "torch.float32", "model": str(self.target)},
            "speculative_config": {"method": self.method, "model": str(self.started_with)},
            "weight_transfer_config": {"backend": BACKEND},
        }

    def metrics(self) -> str:
        """Return samples as vLLM 0.32.0 writes them: tau 2.5 in blocks of 3."""
        self.steps += 10
        label = 'engine="0",model_name="m"'
        positions = [f'{{{label},position="{k}"}} {n}.0' for k, n in enumerate((self.steps, self.steps // 2))]
        return "\n".join(
            [
                "# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.",
                "process_start_time_seconds 1.7960256e+09",
                f'vllm:request_success_total{{{label},finished_reason="stop"}} {self.steps / 10}',
                f'vllm:request_success_total{{{label},finished_reason="length"}} 0.0',
                f"vllm:spec_decode_num_drafts_total{{{label}}} {self.steps}.0",
                f"vllm:spec_decode_num_accepted_tokens_total{{{label}}} {1.5 * self.steps}",
                *(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{each}" for each in positions),
            ]
        )

    def refuse(self, call: str, wrong: bool = False) -> None:
        if wrong or self.broken == call:
            raise Refusal(500, f"{call}: an update is already active")

    def name(self, version: str) -> dict[str, Any]:
        self.version = version
        return {}

    def begin(self) -> dict[str, Any]:
        self.refuse("start", self.active)
        self.active = True
        return {}

    def write(self, update: dict[str, str]) -> dict[str, Any] | None:
        self.refuse("update")
        self.writes.append(update["drafter"])
        served = {NEW: OLD, OLD: NEW}[update["drafter"]]
        upload = "runs:/a/drafter" if update["drafter"] == NEW else ""
        assert (update["upload"], update["served"]) == (upload, served) and len(update) == 4
        if self.loses == update["drafter"]:
            self.loses = ""
            return None
        return {}

    def finish(self, version: str | None) -> dict[str, Any]:
        self.refuse("finish", not self.active)
        self.active, self.version = False, version or self.version
        return {}

    def state(self) -> ServerState:
        state = ask_servers([self.url], named=True)[self.url]
        assert isinstance(state, ServerState)
        return state

    def swap(self, outcome: bool | None = True) -> list[Served]:
        """Swap the server; the proof has this outcome."""
        new = NewDrafter(NEW, Path("/b"), "DFLASH", 3, "runs:/a/drafter")
        known, self.recorded = proof_of(self.recorded), []
        prover = Prover(Proof(outcome, "of 9 verify steps."))
        Swap(new, prover, known, self.recorded.append, named=True).swap([self.url])
        return self.recorded


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandIn]:
    (tmp_path / "config.json").write_text('{"speculators_model_type": "dflash"}')
    (tmp_path / "drafter.json").write_text(json.dumps({"parents": ["c" * 64, OLD]}))
    stand_in = StandIn(tmp_path)
    with serving(lambda _: {}, **stand_in.replies()) as stand_in.http:
        yield stand_in


def test_a_server_reports_the_drafter_that_was_exported_and_its_tau(server: StandIn) -> None:
    state = server.state()
    assert (state.engine, state.algorithm, state.digest, state.block_size) == ("vllm", "DFLASH", OLD, 3)
    assert (state.tau, state.dtype, state.since) == (2.5, "float32", "2026-11-30T08:00:00+00:00")
    windows = count_finished([server.url], 0.0)[server.url]
    assert isinstance(windows, list) and len(windows) == 30
    assert {(each.requests, each.committed, each.steps) for each in windows} == {(1, 25, 10)}


@pytest.mark.parametrize(("own", "digest"), [(True, ""), (False, OLD)])
def test_a_native_head_is_known_by_its_method_and_has_a_digest_in_a_folder_of_its_own(
    server: StandIn, own: bool, digest: str
) -> None:
    """vLLM names the target's folder where no other is given, and the digest of that would be no drafter's."""
    server.method = "mtp"
    if own:
        server.target = server.started_with
    state = server.state()
    assert (state.algorithm, state.own_head, state.digest) == ("NEXTN", own, digest)


def test_a_server_gets_the_key_of_its_engine(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.http is not None
    server.http.api_key = "key of vLLM"
    monkeypatch.setenv(API_KEYS["sglang"], "another")
    with pytest.raises(DraftsmithError, match=API_KEYS["vllm"]):
        server.swap()
    monkeypatch.setenv(API_KEYS["vllm"], "key of vLLM")
    server.swap()
    assert server.state().digest == NEW


def test_a_stock_server_is_watched_and_not_swapped(server: StandIn) -> None:
    assert server.http is not None
    del server.http.replies["/weight_info"]
    assert (server.state().digest, server.state().tau) == (None, 2.5)
    with pytest.raises(DraftsmithError, match="VLLM_SERVER_DEV_MODE"):
        server.swap()


def test_a_drafter_is_written_and_proven(server: StandIn) -> None:
    server.active = True  # left by a command that was killed
    (served,) = server.swap()
    assert server.writes == [NEW] and not server.active
    state = server.state()
    assert (state.digest, state.before, state.since) == (NEW, OLD, served.since) and served.proof
    assert server.http is not None and server.http.count("/reset_prefix_cache?reset_running_requests=true") == 1
    server.swap()
    assert server.writes == [NEW], "it is served already"
    server.version = "default"  # it was started again, and drafts with the folder of its options
    server.swap()
    assert server.writes == [NEW, NEW]


@pytest.mark.parametrize("change", [with_another_mask, without_a_layer])
def test_a_drafter_of_which_more_than_weights_differs_is_refused_before_anything_is_sent(
    server: StandIn, tiny_drafter: DrafterArtifacts, tmp_path: Path, change: Edit
) -> None:
    """vLLM's own loader would ignore either."""
    served = tiny_drafter.drafter / DRAFTER_FOLDER
    change(other := Path(shutil.copytree(served, tmp_path / "other")))
    new = NewDrafter(drafter_digest(other), other, "DFLASH", 8)

    def load() -> tuple[Path, list[list[int]]]:
        raise AssertionError("a rollback checks this before it loads the target")

    prover = ReplayProver(new, lambda _: NewDrafter(OLD, served, "DFLASH", 8), load)
    with pytest.raises(DraftsmithError, match=r"dflash_config|lacks"):
        Swap(new, prover, lambda _: None, lambda _: None).swap([server.url])
    assert server.http is not None and not server.http.count("/start_draft_weight_update")


@pytest.mark.parametrize("outcome", [False, None])
def test_a_failed_proof_writes_the_old_drafter_back(server: StandIn, outcome: bool | None) -> None:
    with pytest.raises(RefusedError, match="drafts with aaaaaaaaaaaa again"):
        server.swap(outcome)
    assert server.writes == [NEW, OLD] and server.state().digest == OLD
    (served,) = server.recorded
    assert (served.drafter, served.since) == (OLD, server.state().since) and "not proven" in served.proof


def test_a_lost_answer_to_the_write_writes_the_old_drafter_back(server: StandIn) -> None:
    server.loses = NEW
    with pytest.raises(RetryableError, match="drafts with aaaaaaaaaaaa again"):
        server.swap()
    assert server.writes == [NEW, OLD] and server.state().digest == OLD


def test_a_refused_drafter_changes_nothing(server: StandIn) -> None:
    before, server.broken = server.state(), "update"
    with pytest.raises(DraftsmithError, match=r"refuses the drafter.* drafts with aaaaaaaaaaaa again"):
        server.swap()
    assert (server.state().digest, server.state().since) == (OLD, before.since) and not server.writes


@pytest.mark.parametrize("since", ["", "2026-11-30T09:00:00+00:00"], ids=["while it was written", "later"])
def test_a_command_that_was_killed_before_its_proof_is_made_again(server: StandIn, since: str) -> None:
    """Whatever the version of the weights, which anybody can set, says of a proof."""
    report = {"drafter": NEW, "since": since, "before": OLD, "pause_s": 0.0, "proof": "of 99 verify steps."}
    server.version = json.dumps(report)
    (served,) = server.swap()
    assert server.writes == [NEW]
    assert (server.state().digest, server.state().before) == (NEW, OLD) and served.proof == "of 9 verify steps."


@pytest.mark.parametrize("version", ["{", "{}", '{"drafter": "../..", "since": "", "before": ""}'])
def test_a_version_that_is_not_ours_is_an_error(server: StandIn, version: str) -> None:
    server.version = version
    with pytest.raises(DraftsmithError, match="cannot be read"):
        server.swap()
    assert not server.writes
