"""Asks a server for answers, and proves by replay of their verify steps which drafter it drafts with."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.digest import BOOKKEEPING
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.kinds import identify, open_servers
from draftsmith.stages.engines.served import API_KEYS
from draftsmith.stages.engines.servers.requirements import server_requirements
from draftsmith.stages.engines.servers.state import NewDrafter, ServerState
from draftsmith.stages.engines.swap import Prove
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.proof import Proof, ServedAnswer, prove
from draftsmith.stages.target.causal_lm import Target

log = logging.getLogger(__name__)

_ANSWERS, _TOKENS = 8, 64  # asked at a time, until the proof is not inconclusive


class ReplayProver:
    """Makes the proof of each server; the target is read once, on the CPU, since servers occupy the GPUs.

    target: the artifact. folder_of: of the drafter that a server serves; raises DraftsmithError if it is not known.
    prompts: token ids; the first ones are asked, as many as it takes.
    """

    def __init__(
        self, target: Path, new: NewDrafter, folder_of: Callable[[ServerState], Path], prompts: Sequence[list[int]]
    ) -> None:
        self._target_folder, self._target = target, Target.load(target, device="cpu")
        self._new, self._folder_of = new, folder_of
        self._requests = [Request(f"{i} of the proof", prompt, _TOKENS) for i, prompt in enumerate(prompts)]
        # the old one may be of an earlier target
        self._drafter: Callable[[Path], Drafter] = cache(partial(load_drafter, target=self._target, any_target=True))

    def __call__(self, before: ServerState) -> Prove:
        """Return the proof that a server drafts with the new drafter, no longer with the one that it serves now.

        Raises DraftsmithError if more than weights differs.
        """
        old = self._drafter(self._folder_of(before))
        new = self._drafter(self._new.folder)
        if field := _different_field(old, new):
            raise DraftsmithError(
                f"{before.url}: the new drafter's {field} differs from the served one's. Start the server with it."
            )
        return lambda: self._prove(before, old, new)

    def _prove(self, before: ServerState, old: Drafter, new: Drafter) -> Proof:
        key = API_KEYS[before.engine]
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
                # without steps: of too few tokens, or retracted
                answers += [(answer.trajectory(), answer.trace()) for answer in batch if answer.steps]
                proof = prove(self._target, old, new, answers, ReplayOptions(drafting), float32=float32)
                if proof.swapped is not None:
                    break
        if proof is None or not answers:
            raise DraftsmithError(
                f"{before.url}: gave no answer whose steps can be read. Try again when it is less busy."
            )
        return proof


def _different_field(old: Drafter, new: Drafter) -> str | None:
    """Return a field of config.json by which the drafters compute differently; None if only weights differ."""
    ours, theirs = (cast("Any", each).config.to_dict() for each in (old, new))
    fields = sorted((ours.keys() | theirs.keys()) - BOOKKEEPING)
    return next((name for name in fields if ours.get(name) != theirs.get(name)), None)
