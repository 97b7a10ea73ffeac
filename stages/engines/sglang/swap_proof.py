"""Asks a server for answers, and proves by replay of their verify steps which drafter it drafts with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import httpx
import torch

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.servers.client import RequestLostError, ServerAnswer, check_status, key_header
from draftsmith.stages.engines.sglang.records import generate_payload, read_completion
from draftsmith.stages.engines.sglang.swap import NewDrafter, Prove, Served
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.proof import Proof, ServedAnswer, prove
from draftsmith.stages.target.causal_lm import Target

_ANSWERS, _TOKENS = 8, 64  # asked at a time, until the proof is not inconclusive
_TIMEOUT_S = 600.0


class ReplayProver:
    """Makes the proof of each server; the target is read once, on the CPU, since servers occupy the GPUs.

    target: the artifact. folder_of: of the drafter that a server serves; raises DraftsmithError if it is not known.
    prompts: token ids; the first ones are asked, as many as it takes.
    """

    def __init__(
        self,
        target: Path,
        new: NewDrafter,
        folder_of: Callable[[Served], Path],
        prompts: Sequence[list[int]],
        api_key: str | None,
    ) -> None:
        self._target, self._new, self._folder_of = Target.load(target, device="cpu"), new, folder_of
        self._prompts, self._headers = prompts, key_header(api_key)
        # the old one may be of an earlier target
        self._drafter: Callable[[Path], Drafter] = cache(partial(load_drafter, target=self._target, any_target=True))

    def __call__(self, before: Served) -> Prove:
        """Return the proof that a server drafts with the new drafter, no longer with the one that it serves now."""
        old = self._drafter(self._folder_of(before))
        new = self._drafter(self._new.folder)
        return lambda url: self._prove(url, old, new, before)

    def _prove(self, url: str, old: Drafter, new: Drafter, before: Served) -> Proof:
        options = ReplayOptions(DraftingConfig(block_size=before.block_size))
        float32 = before.dtype == "float32" and self._target.dtype is torch.float32
        answers: list[ServedAnswer] = []
        proof: Proof | None = None
        http = httpx.Client(headers=self._headers, timeout=_TIMEOUT_S, trust_env=False)
        with http as client, ThreadPoolExecutor(_ANSWERS) as pool:
            for start in range(0, len(self._prompts), _ANSWERS):
                batch = self._prompts[start : start + _ANSWERS]
                answers += [each for each in pool.map(lambda ids: self._ask(client, url, ids), batch) if each]
                proof = prove(self._target, old, new, answers, options, float32=float32)
                if proof.swapped is not None:
                    break
        if proof is None or not answers:
            raise DraftsmithError(f"{url}: gave no answer whose steps can be read. Try again when it is less busy.")
        return proof

    def _ask(self, client: httpx.Client, url: str, prompt: list[int]) -> ServedAnswer | None:
        """Return the answer to a prompt with its verify steps; None if it has too few tokens, or was retracted."""
        info, request = self._target.info, Request("of the proof", prompt, _TOKENS)
        try:
            response = client.post(f"{url}/generate", json=generate_payload(request, info.eos_ids, traced=True))
            check_status(request.request_id, url, response.status_code, response.text)
        except (httpx.HTTPError, RequestLostError) as error:
            raise RetryableError(f"{url} lost a request of the proof ({error}). Run the same command again.") from error
        body = response.json()
        if body["meta_info"].get("num_retractions"):
            return None
        answer = read_completion(request, ServerAnswer(body), info, self._new.digest)
        return (answer.trajectory(), answer.trace()) if answer.steps else None
