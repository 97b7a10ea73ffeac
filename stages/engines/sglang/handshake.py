"""What a server must be before it is asked: the same model and drafter, and room for the longest request.

All of it is read from what the server says and from short generations. Of a server that somebody else started the
tokenizer and the weights are compared too: by the hub's revision, else by log-probs (`probe.py`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import RetryableError
from draftsmith.stages.engines.base import Request, SamplingParams
from draftsmith.stages.engines.sglang import probe
from draftsmith.stages.engines.sglang.asking import generate, get, json_object, send, wrong
from draftsmith.stages.engines.sglang.client import LostError, check_status
from draftsmith.stages.engines.sglang.expected import PROBE_TEXT, Expected
from draftsmith.stages.engines.sglang.greedy import verifies_greedily
from draftsmith.stages.engines.sglang.protocol import SUPPORTED, supported
from draftsmith.stages.engines.sglang.records import completion_of, trace_identity

if TYPE_CHECKING:
    import httpx

_PROBE_TOKENS = 8
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ServerInfo:
    """What a server said of itself."""

    version: str
    records_trace: bool
    greedy_only: bool = False  # it drafts and verifies greedily: sampled answers would not be the target's
    replicas: int = 1  # of the model
    remarks: list[str] = field(default_factory=list)  # what could not be checked, or is worth knowing


async def check_server(
    client: httpx.AsyncClient, url: str, expected: Expected, log: Callable[[str], None], *, ours: bool
) -> ServerInfo:
    """Check one server. Raises RetryableError if it does not answer, DraftsmithError if it is the wrong one.

    ours: it was started here, so that its files are the right ones.
    """
    try:
        model = await get(client, url, "model_info", "get_model_info")
        server = await get(client, url, "server_info", "get_server_info")
        version = str(server.get("version", "?"))
        remarks = [] if supported(version) else [f"{url} is sglang {version}, outside the tested {SUPPORTED}"]
        if not ours:
            remarks += await _check_model(client, url, model, expected)
            remarks += await check_weights(client, url, str(model.get("model_path")), server, expected, log)
        remarks += _check_drafter(url, server, expected)
        _check_room(url, server, expected)
        if expected.stream and server.get("incremental_streaming_output"):
            raise wrong(url, "streams increments; start it without --incremental-streaming-output")
        records = await _check_generation(client, url, server, expected)
        if expected.drafter_folder is not None and not records and not ours:
            path = server.get("speculative_draft_model_path")
            remarks.append(
                f"{url} drafts with {path}: only the plug-in could tell whether it is {expected.drafter_folder}"
            )
        greedy_only = await _is_greedy_only(client, url, server, expected)
    except LostError as error:
        raise RetryableError(f"engine: {url} {error}; see that the server runs, then run the same command") from error
    return ServerInfo(version, records, greedy_only, replicas=int(server.get("dp_size") or 1), remarks=remarks)


async def records_through(client: httpx.AsyncClient, url: str, expected: Expected) -> bool:
    """Do answers come with records of their verify steps through this router, whose servers are checked?"""
    try:
        return await _check_generation(client, url, {}, expected)
    except LostError as error:
        raise RetryableError(f"engine: {url} {error}; see that the router runs, then run the same command") from error


async def _check_model(client: httpx.AsyncClient, url: str, model: dict[str, Any], expected: Expected) -> list[str]:
    """Is it the target? Returns what could not be checked."""
    target, path = expected.target, str(model.get("model_path"))
    if model.get("is_generation") is False:
        raise wrong(url, f"serves {path}, which does not generate")
    served = {"model_type": model.get("model_type"), "architectures": model.get("architectures")}
    if served["model_type"] not in (None, target.model_type) or (
        served["architectures"] and target.architecture not in served["architectures"]
    ):
        raise wrong(
            url,
            f"serves {path} ({served['model_type']}, {served['architectures']}), "
            f"the target is {target.source} ({target.model_type}, {target.architecture})",
        )
    response = await send(client, "POST", f"{url}/tokenize", {"prompt": PROBE_TEXT, "add_special_tokens": False})
    tokens = json_object(response).get("tokens") if response.status_code == 200 else None
    if tokens is None:
        return [f"{url} does not tokenize: its vocabulary could not be compared"]
    if tokens != expected.probe_ids:
        raise wrong(url, f"serves {path}, whose tokenizer is not that of the target {target.source}")
    return []


async def check_weights(
    client: httpx.AsyncClient,
    url: str,
    path: str,
    server: dict[str, Any],
    expected: Expected,
    log: Callable[[str], None],
) -> list[str]:
    """Are they the target's? By the hub's revision, else by what it computes. Returns what could not be checked."""
    target, tokens, revision = expected.target, expected.scored_ids, str(server.get("revision") or "")
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
    response = await send(client, "POST", f"{url}/generate", probe.payload(tokens))
    check_status("of the handshake", url, response.status_code, response.text)
    theirs = probe.served_logprobs(json_object(response), tokens)
    if theirs is None:
        return [f"{url} gives no log-probs of a prompt: the weights of {path} could not be compared with the target's"]
    try:
        ours = await asyncio.to_thread(probe.own_logprobs, expected.target_folder, tokens, log)
    except probe.NoRoomError as error:
        return [
            f"{url} serves {path}: its weights could not be compared with the target's, {error}; start the server with "
            "--revision and its commit, which is compared instead"
        ]
    difference = probe.mean_difference(ours, theirs)
    allowed = probe.tolerance(target.dtype, server.get("dtype"))
    if difference > allowed:
        raise wrong(
            url,
            f"serves {path}, whose log-probs of {len(ours)} fixed tokens are {difference:.3g} nats from those of the "
            f"target {target.source} in the mean (rounding is at most {allowed:g}): other weights; serve revision "
            f"{target.revision or target.digest[:12]}",
        )
    return [f"{url} serves {path}: log-probs of {len(ours)} fixed tokens are {difference:.2g} nats from the target's"]


def _check_drafter(url: str, server: dict[str, Any], expected: Expected) -> list[str]:
    """Does it speculate with such a drafter? Returns what is worth knowing."""
    algorithm = server.get("speculative_algorithm")
    for name in ("speculative_accept_threshold_single", "speculative_accept_threshold_acc"):
        if algorithm and (least := server.get(name)) not in (None, 1):
            option = name.replace("_", "-")
            raise wrong(url, f"keeps proposals that the target would not (--{option} {least}); start it without")
    if expected.drafter_folder is None:
        if algorithm:
            return [f"{url} drafts with {algorithm}: answers are the target's all the same, verification is lossless"]
        return []
    if not algorithm:
        raise wrong(
            url,
            f"serves the target without a drafter: start it with --speculative-algorithm {expected.algorithm} and "
            f"--speculative-draft-model-path {expected.drafter_folder}",
        )
    if algorithm != expected.algorithm:
        raise wrong(url, f"drafts by {algorithm}; start it with --speculative-algorithm {expected.algorithm}")
    tokens = expected.block_size
    if (served := server.get("speculative_num_draft_tokens")) != tokens:
        raise wrong(
            url,
            f"drafts blocks of {served}, drafting.block_size means {tokens}; "
            f"start it with --speculative-num-draft-tokens {tokens}",
        )
    if (branches := server.get("speculative_eagle_topk") or 1) != 1:
        raise wrong(url, f"drafts with --speculative-eagle-topk {branches}; start it with 1")
    return []


def _check_room(url: str, server: dict[str, Any], expected: Expected) -> None:
    """SGLang shortens an answer that does not fit without a word (Scheduler.init_req_max_new_tokens)."""
    verified = expected.block_size or 0  # tokens of one verify step
    limits = []
    if longest_input := server.get("max_req_input_len"):
        limits.append(int(longest_input) + 4)  # of the context and the memory, the smaller one, less 1 + 5
    if memory := server.get("max_total_num_tokens"):
        limits.append(int(memory) - 2 * int(server.get("page_size") or 1) - verified)
    if limits and expected.longest > min(limits):
        raise wrong(
            url,
            f"has room for {min(limits)} positions a request, the longest needs {expected.longest}; lower "
            "sampling.max_new_tokens or prompts.max_prompt_tokens, or raise --context-length or --max-total-tokens",
        )


async def _check_generation(client: httpx.AsyncClient, url: str, server: dict[str, Any], expected: Expected) -> bool:
    """A greedy generation: are its tokens of this vocabulary? Returns whether it came with records of its steps."""
    request = Request("of the handshake", expected.probe_ids, SamplingParams(_PROBE_TOKENS))
    traced = expected.trace and expected.drafter_folder is not None
    body = await generate(client, url, request, traced=traced)
    meta = body.get("meta_info") or {}
    digest = trace_identity(request.request_id, meta) if traced else None
    if digest is not None and digest != expected.drafter_digest:
        raise wrong(url, f"drafts with {digest[:12] or 'a drafter without a digest'}, not {expected.drafter_folder}")
    completion_of(
        request,
        body,
        eos_ids=expected.target.eos_ids,
        vocab_size=expected.target.vocab_size,
        records_of=digest,
    )
    if server.get("speculative_algorithm") and not meta.get("spec_verify_ct"):
        raise wrong(url, "does not say how many verify steps a request took (spec_verify_ct): use a supported release")
    return digest is not None


async def _is_greedy_only(client: httpx.AsyncClient, url: str, server: dict[str, Any], expected: Expected) -> bool:
    """Known of a CPU, where a sampled request ends a server of DSPARK; asked of every other device."""
    if not server.get("speculative_algorithm"):
        return False
    return server.get("device") == "cpu" or await verifies_greedily(client, url, expected.target, expected.probe_ids)
