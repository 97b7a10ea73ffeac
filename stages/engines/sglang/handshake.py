"""Checks of a server before its first request: same model, same drafter, and enough context.

SGLang's own `/weights_checker` cannot be compared with files: it hashes tensors as stored on a GPU (merged, sharded,
by a Triton kernel), and fails on a CPU.

Greedy verification is detected at a temperature that makes all tokens of the vocabulary about equally likely; a server
may report `cuda` without having it. The first token is sampled from the prompt without a verify step. If the next
`_EQUAL` tokens equal those of greedy decoding, they were not sampled: by chance that happens once in
(vocabulary)^`_EQUAL`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import httpx

from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.servers.api import ServerInfo
from draftsmith.stages.engines.servers.http import (
    ServerAnswer,
    check_status,
    get_json,
    json_object,
    query,
    reachable,
    wrong_server,
)
from draftsmith.stages.engines.servers.identity import ServedTarget, check_tokenizer, check_weights
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.engines.sglang.protocol import NATIVE, Json
from draftsmith.stages.engines.sglang.records import generate_payload, read_completion, recorded_drafter
from draftsmith.stages.engines.sglang.releases import SUPPORTED, supported
from draftsmith.stages.targets.info import TargetInfo
from draftsmith.stages.targets.sampling import SamplingParams

_PROBE_TOKENS = 8
_REQUEST_NAME = "of the handshake"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TEMPERATURE = 1e3
_EQUAL = 3
_ROUNDS = 3  # a near-tie in half precision may hide greedy verification in one round


async def check_server(
    client: httpx.AsyncClient, url: str, required: ServerRequirements, log: Callable[[str], None], *, ours: bool
) -> ServerInfo:
    """Check one server. Raises RetryableError if it does not answer, DraftsmithError if it is the wrong one.

    ours: it was started here, so its files are the right ones.
    """
    with reachable(url):
        model = await get_json(client, url, "model_info")
        server = await get_json(client, url, "server_info")
        version = str(server.get("version", "?"))
        remarks = [] if supported(version) else [f"{url} is sglang {version}, outside the tested {SUPPORTED}"]
        served = _served_target(url, str(model.get("model_path")), server, ours=ours)
        if not ours:
            remarks += await check_tokenizer(client, url, served.path, required)
            served = replace(served, known=_known_by_revision(served, server, required.target))
        scored = partial(served_logprobs, client, url, required.scored_ids)
        compared, difference = await check_weights(served, scored, required, log)
        remarks += compared
        remarks += _check_drafter(url, server, required)
        _check_context(url, server, required)
        remarks += _check_running_requests(url, server, required)
        records = await _check_generation(client, url, server, required)
        if required.drafter_folder is not None and not records and not ours:
            drafter = server.get("speculative_draft_model_path")
            remarks.append(
                f"{url} drafts with {drafter}: only the plug-in could tell whether it is {required.drafter_folder}"
            )
        greedy_only = bool(server.get("speculative_algorithm")) and (
            server.get("device") == "cpu"  # it is not asked: a sampled request ends a DSPARK server there
            or await verifies_greedily(client, url, required.target, required.probe_ids)
        )
    replicas = int(server.get("dp_size") or 1)
    return ServerInfo(version, records, greedy_only, replicas, remarks, difference)


async def served_block_size(client: httpx.AsyncClient, url: str) -> int | None:
    """Return the tokens of a server's verify step, with the anchor; None if it does not draft."""
    size: int | None = (await get_json(client, url, "server_info")).get("speculative_num_draft_tokens")
    return size


async def router_passes_records(client: httpx.AsyncClient, url: str, required: ServerRequirements) -> bool:
    """Return whether answers come through this router with the records of their steps. Its servers are checked."""
    with reachable(url):
        return await _check_generation(client, url, {}, required)


def _check_drafter(url: str, server: Json, required: ServerRequirements) -> list[str]:
    """Check that the server drafts as required. Returns remarks."""
    algorithm = server.get("speculative_algorithm")
    for name in ("speculative_accept_threshold_single", "speculative_accept_threshold_acc"):
        if algorithm and (threshold := server.get(name)) not in (None, 1):
            option = name.replace("_", "-")
            raise wrong_server(
                url, f"accepts proposals that the target would reject (--{option} {threshold}). Start it without."
            )
    if required.drafter_folder is None:
        if algorithm:
            return [f"{url} drafts with {algorithm}: answers are the target's all the same, verification is lossless"]
        return []
    if not algorithm:
        raise wrong_server(
            url,
            f"serves the target without a drafter. Start it with --speculative-algorithm {required.algorithm} and "
            f"--speculative-draft-model-path {required.drafter_folder}.",
        )
    if NATIVE.get(algorithm, algorithm) != required.algorithm:
        raise wrong_server(url, f"drafts by {algorithm}. Start it with --speculative-algorithm {required.algorithm}.")
    tokens = required.block_size
    if (served := server.get("speculative_num_draft_tokens")) != tokens:
        raise wrong_server(
            url,
            f"drafts blocks of {served}, drafting.block_size means {tokens}. "
            f"Start it with --speculative-num-draft-tokens {tokens}.",
        )
    if (branches := server.get("speculative_eagle_topk") or 1) != 1:
        raise wrong_server(url, f"drafts with --speculative-eagle-topk {branches}. Start it with 1.")
    return []


def _check_context(url: str, server: Json, required: ServerRequirements) -> None:
    """Check that the longest request fits: SGLang shortens answers silently (Scheduler.init_req_max_new_tokens)."""
    verified = required.block_size or 0  # tokens of one verify step
    limits = []
    if longest_input := server.get("max_req_input_len"):
        limits.append(int(longest_input) + 4)  # the smaller of context and memory, less 1 + 5
    if memory := server.get("max_total_num_tokens"):
        limits.append(int(memory) - 2 * int(server.get("page_size") or 1) - verified)
    if limits and required.longest > min(limits):
        raise wrong_server(
            url,
            f"takes {min(limits)} positions per request, the longest needs {required.longest}. Lower "
            "sampling.max_new_tokens or prompts.max_prompt_tokens, or raise --context-length or --max-total-tokens.",
        )


def _check_running_requests(url: str, server: Json, required: ServerRequirements) -> list[str]:
    """Check that no request has to wait in the server's queue, which an evaluation would measure. Returns a remark."""
    limits = [state.get("effective_max_running_requests_per_dp") for state in server.get("internal_states") or ()]
    limit = min((int(bound) for bound in limits if bound), default=required.concurrency)
    if limit >= required.concurrency:
        return []
    problem = (
        f"computes {limit} requests at a time of {required.concurrency} in flight, and the others wait. Lower "
        "concurrency, or start it with more memory or a higher --max-running-requests."
    )
    if required.measure_first_token:
        raise wrong_server(url, problem)
    return [f"{url} {problem}"]


async def _check_generation(client: httpx.AsyncClient, url: str, server: Json, required: ServerRequirements) -> bool:
    """Generate greedily and check the tokens. Returns whether records of the verify steps came with them."""
    request = Request(_REQUEST_NAME, required.probe_ids, _PROBE_TOKENS)
    answer = await _generate(client, url, request, traced=required.drafter_folder is not None)
    meta = answer.body.get("meta_info") or {}
    digest = recorded_drafter(request.request_id, meta) if required.drafter_folder is not None else None
    if digest is not None and digest not in required.reported_digests:
        served = digest[:12] or "a drafter without a digest"
        raise wrong_server(url, f"drafts with {served}, not {required.drafter_folder}. Start it with that drafter.")
    read_completion(request, answer, required.target, () if digest is None else required.reported_digests)
    if server.get("speculative_algorithm") and not meta.get("spec_verify_ct"):
        raise wrong_server(
            url, "does not report a request's number of verify steps (spec_verify_ct). Use a supported release."
        )
    return digest is not None


async def reported_target(client: httpx.AsyncClient, url: str) -> ServedTarget:
    """Return a server's report about its target."""
    return _served_target(url, "", await get_json(client, url, "server_info"), ours=False)


def _served_target(url: str, path: str, server: Json, *, ours: bool) -> ServedTarget:
    """Return the target according to a server's /server_info. path: the served model."""
    quantization = server.get("quantization") or server.get("torchao_config")
    return ServedTarget(url, path, server.get("dtype"), quantization, server.get("kv_cache_dtype"), known=ours)


def _known_by_revision(served: ServedTarget, server: Json, target: TargetInfo) -> bool:
    """Return whether a server has the target's commit of the hub. Raises DraftsmithError if it has another one."""
    revision = str(server.get("revision") or "")
    if served.path != target.source or target.revision is None or not _COMMIT.fullmatch(revision):
        return False
    if revision != target.revision:
        raise wrong_server(
            served.url,
            f"serves {served.path} of revision {revision}, the target is revision {target.revision}. Start it with "
            f"--revision {target.revision}, or set target.revision.",
        )
    return True


async def served_logprobs(client: httpx.AsyncClient, url: str, tokens: Sequence[int]) -> list[float] | None:
    """Return a server's log-probs of `tokens` after the first; None if one is missing."""
    sampling = {"temperature": 0, "max_new_tokens": 1}
    asked = {"input_ids": list(tokens), "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    answer = await _post(client, url, _REQUEST_NAME, asked)
    try:
        scored = answer.body["meta_info"]["input_token_logprobs"][1:]
        logprobs = [float(entry[0]) for entry in scored]
        scored_tokens = [int(entry[1]) for entry in scored]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return logprobs if scored_tokens == list(tokens[1:]) and all(map(math.isfinite, logprobs)) else None


async def verifies_greedily(client: httpx.AsyncClient, url: str, target: TargetInfo, prompt_ids: list[int]) -> bool:
    """Return whether a server that drafts verifies greedily at any temperature.

    prompt_ids: any prompt. Raises DraftsmithError if an answer does not fit its request.
    """

    async def tokens(request: Request) -> list[int]:
        return read_completion(request, await _generate(client, url, request), target).response_ids

    for seed in range(_ROUNDS):
        sampled = await tokens(Request(_REQUEST_NAME, prompt_ids, 1 + _EQUAL, SamplingParams(_TEMPERATURE), seed))
        greedy = await tokens(Request(_REQUEST_NAME, [*prompt_ids, sampled[0]], _EQUAL))
        if sampled[1:] == greedy:
            return True
    return False


async def _generate(client: httpx.AsyncClient, url: str, request: Request, *, traced: bool = False) -> ServerAnswer:
    """Send a request whose answer is not cut by an end token, and return the answer."""
    payload = generate_payload(request, (), traced)
    payload["sampling_params"]["ignore_eos"] = True
    return await _post(client, url, request.request_id, payload)


async def _post(client: httpx.AsyncClient, url: str, name: str, payload: Json) -> ServerAnswer:
    response = await query(client, "POST", f"{url}/generate", payload)
    check_status(name, url, response.status_code, response.text)
    return ServerAnswer(json_object(response))
