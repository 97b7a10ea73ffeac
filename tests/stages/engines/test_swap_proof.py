"""The proof of a swap by replay: the memory that it needs, and whom it sends an API key."""

from __future__ import annotations

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.server_state import API_KEYS, ask_servers
from draftsmith.stages.engines.servers import identity
from draftsmith.stages.engines.servers.state import NewDrafter, ServerState
from draftsmith.stages.engines.swap_proof import ReplayProver
from tests.stages.engines.http_server import answer, serving
from tests.stages.engines.swaps import SwapServer
from tests.testbed.drafter import DrafterArtifacts


def prover_of(made: DrafterArtifacts, *, named: bool = False) -> tuple[ReplayProver, NewDrafter]:
    """Return the prover of a drafter, and the drafter."""
    folder = made.drafter / DRAFTER_FOLDER
    new = NewDrafter(drafter_digest(folder), folder, "DFLASH", 8)
    return ReplayProver(new, lambda _: new, lambda: (made.target, [[5, 3, 9]]), named=named), new


def test_a_target_that_the_memory_does_not_hold_is_not_loaded(
    tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "free_memory_bytes", lambda: 1e6)
    prover, new = prover_of(tiny_drafter)
    with pytest.raises(DraftsmithError, match=r"the target on the CPU, .* and 0\.0 GB are free\. Run the command on"):
        prover.load([new])


@pytest.mark.parametrize("named", [False, True])
def test_only_a_server_that_somebody_named_gets_the_key(
    tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch, *, named: bool
) -> None:
    monkeypatch.setenv(API_KEYS["sglang"], "key-of-the-fleet")
    prover, new = prover_of(tiny_drafter, named=named)
    prover.load([new])
    server = SwapServer(new.digest)
    with serving(answer, server_info=server.server_info) as http:
        state = ask_servers([http.url])[http.url]
        assert isinstance(state, ServerState)
        with pytest.raises(DraftsmithError):  # it serves no target
            prover.prove(state, new)
        assert http.count("/server_info") > 1
        assert set(http.keys) == ({"Bearer key-of-the-fleet"} if named else set())
