"""What only a server's own numbers tell: whose weights it has, and whether it samples.

**Weights**, where no revision says it: the server scores fixed tokens, and so does the target here, on the CPU. The
mean absolute difference of their log-probs is rounding for the same weights. SGLang's own `/weights_checker` cannot be
held against files: it hashes tensors as they lie on a GPU (merged, sharded, by a Triton kernel), and fails on a CPU.

**Greedy verification**: SGLang takes the argmax where it has no kernel that samples, on a CPU, and by algorithm and
release on AMD, Intel and Ascend devices, which it may call `cuda` all the same. So a server is asked at a temperature
that makes all tokens of the vocabulary about as likely. The first token is sampled from the prompt without a verify
step; where those after it are greedy decoding's, they were not sampled: by chance `_EQUAL` tokens are that once in
(vocabulary)^`_EQUAL`.
"""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.sglang.client import post, wrong
from draftsmith.stages.engines.sglang.records import completion_of, generate_payload
from draftsmith.stages.target.sampling import SamplingParams

if TYPE_CHECKING:
    import httpx

    from draftsmith.stages.target.info import TargetInfo

TEXT = (
    "Question: a train leaves at 9:40 and arrives at 13:05. How long does it travel? Answer: from 9:40 to 13:05 there "
    "are 3 hours and 25 minutes.\n\ndef median(values: list[float]) -> float:\n    ordered = sorted(values)\n"
    "    middle = len(ordered) // 2\n    return ordered[middle]\n\nLa pluie est tombée toute la nuit, et au matin le "
    "jardin sentait la terre. In 1969 two people walked on the Moon for the first time."
)
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}  # nats, of the mean; the coarser of the two dtypes'
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TEMPERATURE = 1e3
_EQUAL = 3
_NAME = "of the handshake"  # of its requests
_ROUNDS = 3  # a near-tie of half precision may hide it from one
_LOCK = threading.Lock()
_KNOWN: dict[tuple[Path | int, ...], list[float]] = {}  # by a target's folder and the tokens


class NoRoomError(Exception):
    """The target does not fit into this machine's memory."""


async def check_weights(
    client: httpx.AsyncClient,
    url: str,
    path: str,
    server: dict[str, Any],
    target: TargetInfo,
    target_folder: Path,
    tokens: Sequence[int],
    log: Callable[[str], None],
) -> list[str]:
    """Compare a server's weights with the target's, by the hub's revision, else by what it computes.

    path: the model that it serves. target_folder: the target's artifact. tokens: of `TEXT`. Returns what could not be
    checked.
    """
    revision = str(server.get("revision") or "")
    if path == target.source and _COMMIT.fullmatch(revision) and target.revision is not None:
        if revision == target.revision:
            return []
        raise wrong(
            url,
            f"serves {path} of revision {revision}, the target is revision {target.revision}; start it with "
            f"--revision {target.revision}, or set target.revision",
        )
    if quantization := server.get("quantization"):
        return [f"{url} serves {path} quantised ({quantization}): its weights could not be compared with the target's"]
    theirs = served_logprobs(await post(client, url, _NAME, payload(tokens)), tokens)
    if theirs is None:
        return [f"{url} gives no log-probs of a prompt: the weights of {path} could not be compared with the target's"]
    try:
        ours = await asyncio.to_thread(own_logprobs, target_folder, tokens, log)
    except NoRoomError as error:
        return [
            f"{url} serves {path}: its weights could not be compared with the target's, {error}; start the server with "
            "--revision and its commit, which is compared instead"
        ]
    difference = mean_difference(ours, theirs)
    allowed = tolerance(target.dtype, server.get("dtype"))
    if difference > allowed:
        raise wrong(
            url,
            f"serves {path}, whose log-probs of {len(ours)} fixed tokens are {difference:.3g} nats from those of the "
            f"target {target.source} in the mean (rounding is at most {allowed:g}): other weights; serve revision "
            f"{target.revision or target.digest[:12]}",
        )
    return [f"{url} serves {path}: log-probs of {len(ours)} fixed tokens are {difference:.2g} nats from the target's"]


def own_logprobs(target_folder: Path, tokens: Sequence[int], log: Callable[[str], None]) -> list[float]:
    """Return the target's log-probs (nats) of `tokens` after the first, in its dtype on the CPU; computed once.

    Raises NoRoomError instead of loading what the memory does not hold.
    """
    with _LOCK:  # of several servers that ask at once, one loads the weights
        if (known := _KNOWN.get((target_folder, *tokens))) is None:
            known = _KNOWN[target_folder, *tokens] = _own_logprobs(target_folder, tokens, log)
        return known


def _own_logprobs(target_folder: Path, tokens: Sequence[int], log: Callable[[str], None]) -> list[float]:
    import torch

    from draftsmith.artifacts.host import free_memory_bytes
    from draftsmith.stages.target.causal_lm import Target
    from draftsmith.stages.target.info import model_path, read_target_info
    from draftsmith.stages.target.layers import weightless_model

    parameters = sum(p.numel() for p in weightless_model(model_path(target_folder)).parameters())
    size = parameters * getattr(torch, read_target_info(target_folder).dtype).itemsize
    needed, free = f"{size / 1e9:.1f} GB", free_memory_bytes()
    if size > free:
        raise NoRoomError(f"which takes {needed} of memory where {free / 1e9:.1f} GB are free")
    log(f"the target is loaded on the CPU, {needed}: its log-probs are compared with a server's")
    target = Target.load(target_folder, device="cpu")
    hidden = target.read(torch.tensor([list(tokens)])).hidden[0, :-1]
    logprobs = target.logits(hidden).float().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def payload(tokens: Sequence[int]) -> dict[str, Any]:
    """Return the body of /generate that asks for log-probs."""
    sampling = {"temperature": 0, "max_new_tokens": 1}
    return {"input_ids": list(tokens), "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}


def served_logprobs(body: dict[str, Any], tokens: Sequence[int]) -> list[float] | None:
    """Return the log-probs of an answer to `payload`; None if one is missing."""
    try:
        scored = body["meta_info"]["input_token_logprobs"][1:]
        found = [float(each[0]) for each in scored]
        asked = [int(each[1]) for each in scored]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return found if asked == list(tokens[1:]) and all(map(math.isfinite, found)) else None


def tolerance(ours: str, theirs: str | None) -> float:
    """Return the tolerance of the mean difference for two dtypes; `theirs` None: the server does not say."""
    return max(TOLERANCE[ours], TOLERANCE.get(theirs or ours, TOLERANCE["bfloat16"]))


def mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the mean absolute difference of two lists of log-probs, nats."""
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)


async def verifies_greedily(client: httpx.AsyncClient, url: str, target: TargetInfo, prompt_ids: list[int]) -> bool:
    """Return whether a server that drafts verifies greedily whatever the temperature.

    prompt_ids: what is continued. Raises DraftsmithError if the server does not answer as it should.
    """
    for seed in range(_ROUNDS):
        sampled = await _tokens(
            client, url, target, Request(_NAME, prompt_ids, 1 + _EQUAL, SamplingParams(_TEMPERATURE), seed)
        )
        greedy = await _tokens(client, url, target, Request(_NAME, [*prompt_ids, sampled[0]], _EQUAL))
        if sampled[1:] == greedy:
            return True
    return False


async def _tokens(client: httpx.AsyncClient, url: str, target: TargetInfo, request: Request) -> list[int]:
    body = await generate(client, url, request)
    done = completion_of(request, body, eos_ids=target.eos_ids, vocab_size=target.vocab_size)
    return done.response_ids


async def generate(client: httpx.AsyncClient, url: str, request: Request, *, traced: bool = False) -> dict[str, Any]:
    """Return the answer to a request, which no token ends before its `max_new_tokens`."""
    payload = generate_payload(request, (), traced)
    payload["sampling_params"]["ignore_eos"] = True
    return await post(client, url, request.request_id, payload)
