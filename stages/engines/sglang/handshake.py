"""Checks of a server before its first request: same model, same drafter, and enough context.

A server's own reports and short generations are checked. For a server that was not started here, the tokenizer and the
weights are compared too.
"""

from __future__ import annotations

from collections.abc import Callable

import httpx

from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.servers.api import ServerInfo
from draftsmith.stages.engines.servers.client import (
    RequestLostError,
    get_json,
    unreachable_server,
    wrong_server,
)
from draftsmith.stages.engines.servers.identity import check_tokenizer
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.engines.sglang import probe
from draftsmith.stages.engines.sglang.protocol import SUPPORTED, Json, supported
from draftsmith.stages.engines.sglang.records import read_completion, recorded_drafter

_PROBE_TOKENS = 8


async def check_server(
    client: httpx.AsyncClient, url: str, required: ServerRequirements, log: Callable[[str], None], *, ours: bool
) -> ServerInfo:
    """Check one server. Raises RetryableError if it does not answer, DraftsmithError if it is the wrong one.

    ours: it was started here, so its files are the right ones.
    """
    try:
        model = await get_json(client, url, "model_info", "get_model_info")
        server = await get_json(client, url, "server_info", "get_server_info")
        version = str(server.get("version", "?"))
        remarks = [] if supported(version) else [f"{url} is sglang {version}, outside the tested {SUPPORTED}"]
        if not ours:
            path = str(model.get("model_path"))
            remarks += await check_tokenizer(client, url, path, required)
            remarks += await probe.check_weights(client, url, path, server, required, log)
        remarks += _check_drafter(url, server, required)
        _check_context(url, server, required)
        remarks += _check_running_requests(url, server, required)
        records = await _check_generation(client, url, server, required)
        if required.drafter_folder is not None and not records and not ours:
            drafter = server.get("speculative_draft_model_path")
            remarks.append(
                f"{url} drafts with {drafter}: only the plug-in could tell whether it is {required.drafter_folder}"
            )
        greedy_only = await _is_greedy_only(client, url, server, required)
    except RequestLostError as error:
        raise unreachable_server(url, error) from error
    return ServerInfo(version, records, greedy_only, replicas=int(server.get("dp_size") or 1), remarks=remarks)


async def served_block_size(client: httpx.AsyncClient, url: str) -> int | None:
    """Return how many tokens a server drafts, the anchor included; None if it drafts none."""
    size: int | None = (await get_json(client, url, "server_info", "get_server_info")).get(
        "speculative_num_draft_tokens"
    )
    return size


async def router_passes_records(client: httpx.AsyncClient, url: str, required: ServerRequirements) -> bool:
    """Return whether answers come through this router with the records of their steps. Its servers are checked."""
    try:
        return await _check_generation(client, url, {}, required)
    except RequestLostError as error:
        raise unreachable_server(url, error) from error


def _check_drafter(url: str, server: Json, required: ServerRequirements) -> list[str]:
    """Check that the server drafts as required. Returns what is worth knowing."""
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
    if algorithm != required.algorithm:
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
            f"takes {min(limits)} positions a request, the longest needs {required.longest}. Lower "
            "sampling.max_new_tokens or prompts.max_prompt_tokens, or raise --context-length or --max-total-tokens.",
        )


def _check_running_requests(url: str, server: Json, required: ServerRequirements) -> list[str]:
    """Check that no request has to wait in the server's queue, which an evaluation would measure. Returns a remark."""
    limits = [state.get("effective_max_running_requests_per_dp") for state in server.get("internal_states") or ()]
    limit = min((int(each) for each in limits if each), default=required.concurrency)
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
    request = Request(probe.REQUEST_NAME, required.probe_ids, _PROBE_TOKENS)
    traced = required.trace and required.drafter_folder is not None
    answer = await probe.generate(client, url, request, traced=traced)
    meta = answer.body.get("meta_info") or {}
    digest = recorded_drafter(request.request_id, meta) if traced else None
    if digest is not None and digest != required.drafter_digest:
        served = digest[:12] or "a drafter without a digest"
        raise wrong_server(url, f"drafts with {served}, not {required.drafter_folder}. Start it with that drafter.")
    read_completion(request, answer, required.target, digest)
    if server.get("speculative_algorithm") and not meta.get("spec_verify_ct"):
        raise wrong_server(
            url, "does not report how many verify steps a request took (spec_verify_ct). Use a supported release."
        )
    return digest is not None


async def _is_greedy_only(client: httpx.AsyncClient, url: str, server: Json, required: ServerRequirements) -> bool:
    """Return whether the server verifies greedily. A CPU is not asked: a sampled request ends a DSPARK server there."""
    if not server.get("speculative_algorithm"):
        return False
    return server.get("device") == "cpu" or await probe.verifies_greedily(
        client, url, required.target, required.probe_ids
    )
