"""Asks a server for answers, and proves by replay of their verify steps which drafter it drafts with."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import check_complete, load_drafter, read_config
from draftsmith.stages.drafters.digest import BOOKKEEPING
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.registry import identify, open_servers
from draftsmith.stages.engines.server_state import API_KEYS
from draftsmith.stages.engines.servers.identity import TargetTooLargeError, check_memory
from draftsmith.stages.engines.servers.requirements import server_requirements
from draftsmith.stages.engines.servers.state import NewDrafter, ServerState
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.proof import Proof, ServedAnswer, prove
from draftsmith.stages.targets.causal_lm import Target

log = logging.getLogger(__name__)

_ANSWERS, _TOKENS = 8, 64  # requested at a time, until the proof is conclusive


class ReplayProver:
    """Makes the proof of each server; the target is loaded once, on the CPU, since servers occupy the GPUs.

    drafter_of: returns the drafter that a server serves; raises DraftsmithError if it is not known. inputs: returns the
    target's artifact and prompts as token ids; prompts are sent from the first on, as many as the proof needs. named:
    same as in `from_servers`.
    """

    def __init__(
        self,
        new: NewDrafter,
        drafter_of: Callable[[ServerState], NewDrafter],
        inputs: Callable[[], tuple[Path, Sequence[list[int]]]],
        *,
        named: bool = False,
    ) -> None:
        self._new, self._drafter_of, self._inputs, self._named = new, drafter_of, inputs, named

    def served(self, before: ServerState) -> NewDrafter:
        """Return the drafter of a server. Raises DraftsmithError if more than weights differs. Reads no weights."""
        check_complete(self._new.folder)
        old = self._drafter_of(before)
        if field := _different_field(old.folder, self._new.folder):
            raise DraftsmithError(
                f"{before.url}: the new drafter's {field} differs from the served one's. Start the server with it."
            )
        return old

    def load(self, olds: Sequence[NewDrafter]) -> None:
        """Load target and drafters. Raises DraftsmithError if they are not here, or the memory does not hold them."""
        self._target_folder, prompts = self._inputs()
        try:
            check_memory(self._target_folder)
        except TargetTooLargeError as error:
            raise DraftsmithError(
                f"the proof loads the target on the CPU, {error}. Run the command on a machine with more memory."
            ) from error
        self._target = Target.load(self._target_folder, device="cpu")
        self._requests = [Request(f"{i} of the proof", prompt, _TOKENS) for i, prompt in enumerate(prompts)]
        # the old one may be of an earlier target
        self._drafter: Callable[[Path], Drafter] = cache(partial(load_drafter, target=self._target, any_target=True))
        for drafter in (self._new, *olds):
            self._drafter(drafter.folder)

    def prove(self, before: ServerState, old: NewDrafter) -> Proof:
        """Return whether a server drafts with the new drafter and no longer with the one before."""
        key = API_KEYS[before.engine] if self._named else ""
        engine, block_size = identify(before.url, key if os.environ.get(key) else None)
        drafting = DraftingConfig(block_size=block_size)
        longest = max(len(request.prompt_ids) for request in self._requests) + _TOKENS
        required = server_requirements(engine, self._target_folder, self._new.folder, drafting, longest)
        float32 = before.dtype == "float32" and self._target.dtype is torch.float32
        answers: list[ServedAnswer] = []
        proof: Proof | None = None
        with TemporaryDirectory() as work, open_servers(engine, required, Path(work), log.info) as server:
            for start in range(0, len(self._requests), _ANSWERS):
                batch = server.generate(self._requests[start : start + _ANSWERS])
                # an answer lacks steps if it is too short or was retracted
                answers += [(answer.trajectory(), answer.steps) for answer in batch if answer.steps]
                pair = self._drafter(old.folder), self._drafter(self._new.folder)
                proof = prove(self._target, *pair, answers, ReplayOptions(drafting), float32=float32)
                if proof.swapped is not None:
                    break
        if proof is None or not answers:
            raise DraftsmithError(f"{before.url}: gave no answer with readable steps. Try again when it is less busy.")
        return proof


def _different_field(old: Path, new: Path) -> str | None:
    """Return a field of config.json by which drafters compute differently; None if only weights differ."""
    ours, theirs = (read_config(folder)[1].to_dict() for folder in (old, new))
    fields = sorted((ours.keys() | theirs.keys()) - BOOKKEEPING)
    return next((name for name in fields if ours.get(name) != theirs.get(name)), None)
