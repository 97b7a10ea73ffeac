"""Checks by a server's own numbers: whose weights it serves, and whether it samples.

**Weights**, where no revision identifies them: the server scores fixed tokens, and so does the target here, on the CPU.
With the same weights the mean absolute difference of their log-probs is rounding. SGLang's own `/weights_checker`
cannot be compared with files: it hashes tensors as they lie on a GPU (merged, sharded, by a Triton kernel), and fails
on a CPU.

**Greedy verification**: SGLang takes the argmax where it has no kernel that samples: on a CPU, and by algorithm and
release on AMD, Intel and Ascend devices, which it may report as `cuda`. So a server is asked at a temperature that
makes all tokens of the vocabulary about equally likely. The first token is sampled from the prompt without a verify
step. If the next `_EQUAL` tokens equal those of greedy decoding, they were not sampled: by chance that happens once in
(vocabulary)^`_EQUAL`.
"""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import torch

from draftsmith.artifacts.host import free_memory_bytes
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.sglang.client import ServerAnswer, check_status, json_object, query, wrong_server
from draftsmith.stages.engines.sglang.protocol import Json
from draftsmith.stages.engines.sglang.records import generate_payload, read_completion
from draftsmith.stages.engines.sglang.requirements import ServerRequirements
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.info import TargetInfo, model_path, read_target_info
from draftsmith.stages.target.loading import model_without_weights
from draftsmith.stages.target.sampling import SamplingParams

REQUEST_NAME = "of the handshake"
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}  # nats, of the mean; the coarser of the two dtypes'
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TEMPERATURE = 1e3
_EQUAL = 3
_ROUNDS = 3  # a near-tie of half precision may hide greedy verification in one round
_LOCK = threading.Lock()
_OWN_LOGPROBS: dict[tuple[Path | int, ...], list[float]] = {}  # by a target's folder and the tokens


class TargetTooLargeError(Exception):
    """The target does not fit into this machine's memory."""


async def check_weights(
    client: httpx.AsyncClient,
    url: str,
    path: str,
    server: Json,
    required: ServerRequirements,
    log: Callable[[str], None],
) -> list[str]:
    """Compare a server's weights with the target's, by the hub's revision, else by log-probs.

    path: the model that it serves. server: its /server_info. Returns what could not be checked.
    """
    target, tokens = required.target, required.scored_ids
    revision = str(server.get("revision") or "")
    if path == target.source and _COMMIT.fullmatch(revision) and target.revision is not None:
        if revision == target.revision:
            return []
        raise wrong_server(
            url,
            f"serves {path} of revision {revision}, the target is revision {target.revision}. Start it with "
            f"--revision {target.revision}, or set target.revision.",
        )
    if quantization := server.get("quantization"):
        return [f"{url} serves {path} quantised ({quantization}): its weights could not be compared with the target's"]
    theirs = served_logprobs((await _post(client, url, REQUEST_NAME, payload(tokens))).body, tokens)
    if theirs is None:
        return [f"{url} gives no log-probs of a prompt: the weights of {path} could not be compared with the target's"]
    try:
        ours = await asyncio.to_thread(own_logprobs, required.target_folder, tokens, log)
    except TargetTooLargeError as error:
        return [
            f"{url} serves {path}: its weights could not be compared with the target's, {error}. Start the server with "
            "--revision and its commit, which is compared instead."
        ]
    difference = mean_difference(ours, theirs)
    allowed = tolerance(target.dtype, server.get("dtype"))
    if difference > allowed:
        raise wrong_server(
            url,
            f"serves {path} with other weights: its log-probs of {len(ours)} fixed tokens are {difference:.3g} nats "
            f"from those of the target {target.source} in the mean (rounding is at most {allowed:g}). Serve revision "
            f"{target.revision or target.digest[:12]}.",
        )
    return [f"{url} serves {path}: log-probs of {len(ours)} fixed tokens are {difference:.2g} nats from the target's"]


def own_logprobs(target_folder: Path, tokens: Sequence[int], log: Callable[[str], None]) -> list[float]:
    """Return the target's log-probs (nats) of `tokens` after the first, in its dtype on the CPU; computed once.

    Raises TargetTooLargeError instead of loading weights that the memory does not hold.
    """
    with _LOCK:  # several servers are checked concurrently, and one check loads the weights
        if (logprobs := _OWN_LOGPROBS.get((target_folder, *tokens))) is None:
            logprobs = _OWN_LOGPROBS[target_folder, *tokens] = _compute_logprobs(target_folder, tokens, log)
        return logprobs


def _compute_logprobs(target_folder: Path, tokens: Sequence[int], log: Callable[[str], None]) -> list[float]:
    parameters = sum(p.numel() for p in model_without_weights(model_path(target_folder)).parameters())
    size = parameters * getattr(torch, read_target_info(target_folder).dtype).itemsize
    needed, free = f"{size / 1e9:.1f} GB", free_memory_bytes()
    if size > free:
        raise TargetTooLargeError(f"which takes {needed} of memory where {free / 1e9:.1f} GB are free")
    log(f"loading the target on the CPU, {needed}, to compare its log-probs with a server's")
    target = Target.load(target_folder, device="cpu")
    hidden = target.read(torch.tensor([list(tokens)])).hidden[0, :-1]
    logprobs = target.logits(hidden).float().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def payload(tokens: Sequence[int]) -> Json:
    """Return the body of /generate that asks for log-probs."""
    sampling = {"temperature": 0, "max_new_tokens": 1}
    return {"input_ids": list(tokens), "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}


def served_logprobs(body: Json, tokens: Sequence[int]) -> list[float] | None:
    """Return the log-probs of an answer to `payload`; None if one is missing."""
    try:
        scored = body["meta_info"]["input_token_logprobs"][1:]
        logprobs = [float(each[0]) for each in scored]
        scored_tokens = [int(each[1]) for each in scored]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return logprobs if scored_tokens == list(tokens[1:]) and all(map(math.isfinite, logprobs)) else None


def tolerance(ours: str, theirs: str | None) -> float:
    """Return the tolerance of the mean difference for two dtypes; `theirs` None: the server does not report its own."""
    return max(TOLERANCE[ours], TOLERANCE.get(theirs or ours, TOLERANCE["bfloat16"]))


def mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the mean absolute difference of two lists of log-probs, nats."""
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)


async def verifies_greedily(client: httpx.AsyncClient, url: str, target: TargetInfo, prompt_ids: list[int]) -> bool:
    """Return whether a server that drafts verifies greedily whatever the temperature.

    prompt_ids: any prompt. Raises DraftsmithError if an answer does not fit its request.
    """

    async def tokens(request: Request) -> list[int]:
        return read_completion(request, await generate(client, url, request), target).response_ids

    for seed in range(_ROUNDS):
        sampled = await tokens(Request(REQUEST_NAME, prompt_ids, 1 + _EQUAL, SamplingParams(_TEMPERATURE), seed))
        greedy = await tokens(Request(REQUEST_NAME, [*prompt_ids, sampled[0]], _EQUAL))
        if sampled[1:] == greedy:
            return True
    return False


async def generate(client: httpx.AsyncClient, url: str, request: Request, *, traced: bool = False) -> ServerAnswer:
    """Send a request whose answer no end token cuts short, and return the answer."""
    payload = generate_payload(request, (), traced)
    payload["sampling_params"]["ignore_eos"] = True
    return await _post(client, url, request.request_id, payload)


async def _post(client: httpx.AsyncClient, url: str, name: str, payload: Json) -> ServerAnswer:
    response = await query(client, "POST", f"{url}/generate", payload)
    check_status(name, url, response.status_code, response.text)
    return ServerAnswer(json_object(response))
