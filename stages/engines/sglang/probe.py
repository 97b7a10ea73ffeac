"""Checks by a SGLang server's own numbers: whose weights it serves, and whether it samples.

**Weights**, where no revision identifies them: by log-probs of fixed tokens (`servers/identity.py`). SGLang's own
`/weights_checker` cannot be compared with files: it hashes tensors as they lie on a GPU (merged, sharded, by a Triton
kernel), and fails on a CPU.

**Greedy verification**: SGLang takes the argmax where it has no kernel that samples: on a CPU, and by algorithm and
release on AMD, Intel and Ascend devices, which it may report as `cuda`. So a server is asked at a temperature that
makes all tokens of the vocabulary about equally likely. The first token is sampled from the prompt without a verify
step. If the next `_EQUAL` tokens equal those of greedy decoding, they were not sampled: by chance that happens once in
(vocabulary)^`_EQUAL`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import httpx

from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.servers.client import ServerAnswer, check_status, json_object, query, wrong_server
from draftsmith.stages.engines.servers.identity import compare_weights
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.engines.sglang.protocol import Json
from draftsmith.stages.engines.sglang.records import generate_payload, read_completion
from draftsmith.stages.target.info import TargetInfo
from draftsmith.stages.target.sampling import SamplingParams

REQUEST_NAME = "of the handshake"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TEMPERATURE = 1e3
_EQUAL = 3
_ROUNDS = 3  # a near-tie of half precision may hide greedy verification in one round


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
    return await compare_weights(url, path, server.get("dtype"), theirs, required, log)


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
