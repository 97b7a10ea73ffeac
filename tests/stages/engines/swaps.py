"""A server whose drafter can be swapped, and a prover that loads no target."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.servers.state import NewDrafter, ServerState
from draftsmith.stages.engines.sglang.protocol import SWAP_ACTION, SWAP_STATE, Json
from draftsmith.stages.engines.swap import Served, Swap
from draftsmith.stages.replay.proof import Proof

PROVEN = Proof(True, "compared here.")


@dataclass
class SwapServer:
    """An SGLang server with our plug-in, which needs two requests to read a drafter."""

    drafter: str  # digest
    block_size: int = 8
    before: str = ""
    since: str = "2026-11-30T08:00:00+00:00"
    reports: Json = field(default_factory=dict)  # what a later plug-in reports too
    loses: str = ""  # its answer after it wrote this drafter
    writes: list[str] = field(default_factory=list)
    reading: bool = False

    def server_info(self, _: Json) -> Json:
        served = {"v": 1, "drafter": self.drafter, "since": self.since, "before": self.before, "pause_s": 0.5}
        state = {SWAP_STATE: served | self.reports}
        drafting = {"speculative_algorithm": "DFLASH", "speculative_num_draft_tokens": self.block_size}
        return {"version": "0.5.23", "dtype": "float32", **drafting, "internal_states": [state]}

    def weights_checker(self, payload: Json) -> Json | None:
        wanted = json.loads(payload["action"].removeprefix(SWAP_ACTION))
        assert wanted.keys() == {"drafter", "folder", "upload"}, "no address of MLflow, and no proof"
        self.reading = not self.reading and wanted["drafter"] != self.drafter
        if self.reading:
            return {"success": True, "message": json.dumps({"state": "reading"})}
        if wanted["drafter"] != self.drafter:
            self.before, self.drafter = self.drafter, wanted["drafter"]
            self.writes.append(self.drafter)
            self.since = f"2026-11-30T09:00:0{len(self.writes)}+00:00"
        if self.loses == self.drafter:
            self.loses = ""
            return None
        return {"success": True, "message": json.dumps({"state": "served", "since": self.since, "pause_s": 0.5})}


@dataclass
class Prover:
    """Takes any served drafter, and gives one proof, or that of a function."""

    proof: Proof = PROVEN
    prove_by: Callable[[], Proof] | None = None
    too_large: bool = False  # the target does not fit into the memory
    asked: list[str] = field(default_factory=list)  # servers that had to prove it

    def served(self, before: ServerState) -> NewDrafter:
        return NewDrafter(before.digest or "", Path("/served"), before.algorithm or "", before.block_size)

    def load(self, olds: Sequence[NewDrafter]) -> None:
        assert olds, "nothing is loaded if nothing is due"
        if self.too_large:
            raise DraftsmithError("the proof loads the target on the CPU, which takes 16 GB where 3 GB are free.")

    def prove(self, before: ServerState, old: NewDrafter) -> Proof:
        assert old.digest == before.digest
        self.asked.append(before.url)
        return self.proof if self.prove_by is None else self.prove_by()


def swapped(
    urls: Sequence[str], new: NewDrafter, prover: Prover | None = None, recorded: Sequence[Served] = ()
) -> list[Served]:
    """Swap servers. recorded: by earlier swaps. Returns what is recorded now."""
    done: list[Served] = []
    Swap(new, prover or Prover(), proof_of(recorded), done.append).swap(urls)
    return done


def proof_of(recorded: Sequence[Served]) -> Callable[[ServerState], str | None]:
    """Return what a registry knows of a server's proof."""

    def proof(state: ServerState) -> str | None:
        known = {(each.url, each.drafter, each.since): each.proof for each in recorded}
        return known.get((state.url, state.digest or "", state.since or "")) or None

    return proof
