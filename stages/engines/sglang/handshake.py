"""What a server must be before it is asked: the same model, vocabulary and drafter, and room for the longest request.

All of it is read from what the server says and from short generations. The target is loaded here only for a server
whose weights neither lie on its and this machine nor have a revision (`weights.py`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.base import Request, SamplingParams
from draftsmith.stages.engines.sglang.asking import generate, get, is_here, json_object, send, wrong
from draftsmith.stages.engines.sglang.client import LostError
from draftsmith.stages.engines.sglang.expected import PROBE_TEXT, Expected
from draftsmith.stages.engines.sglang.greedy import verifies_greedily
from draftsmith.stages.engines.sglang.protocol import SUPPORTED, supported
from draftsmith.stages.engines.sglang.records import SETTLED, completion_of, trace_identity
from draftsmith.stages.engines.sglang.weights import check_settings, check_weights

if TYPE_CHECKING:
    import httpx

_PROBE_TOKENS = 8
_SAMPLED_OTHERWISE = ("speculative_use_rejection_sampling", "speculative_use_block_verification")
_DRAFTED_OTHERWISE = (  # than the checkpoint says, and so than replay drafts
    "speculative_draft_window_size",
    "speculative_token_map",
    "speculative_adaptive",
    "speculative_draft_model_quantization",
)


@dataclass(frozen=True)
class Facts:
    """What a server said of itself."""

    version: str
    algorithm: str | None  # of speculative decoding
    records_trace: bool
    greedy_only: bool = False  # it drafts and verifies greedily: sampled answers would follow another law
    replicas: int = 1  # of the model
    start: str = ""  # what differs from one start of the server, or one update of its weights, to the next
    remarks: list[str] = field(default_factory=list)  # what could not be checked, or is worth knowing


async def shake_hands(client: httpx.AsyncClient, url: str, expected: Expected, log: Callable[[str], None]) -> Facts:
    """Check one server. Raises RetryableError if it does not answer, DraftsmithError if it is the wrong one."""
    try:
        model = await get(client, url, "model_info", "get_model_info")
        server = await get(client, url, "server_info", "get_server_info")
        here = await asyncio.to_thread(is_here, url)
        version = str(server.get("version", "?"))
        remarks = [] if supported(version) else [f"{url} is sglang {version}, outside the tested {SUPPORTED}"]
        remarks += await _check_model(client, url, model, expected)
        _check_preferred(url, model, server)
        remarks += check_settings(url, model, server, expected)
        remarks += await check_weights(client, url, str(model.get("model_path")), server, expected, log, here=here)
        remarks += await _check_drafter(url, server, expected, here=here)
        _check_room(url, server, expected)
        if expected.stream and server.get("incremental_streaming_output"):
            raise wrong(url, "streams increments; start it without --incremental-streaming-output")
        records = await _check_generation(client, url, server, expected)
        greedy_only = await _is_greedy_only(client, url, server, expected)
    except LostError as error:
        raise RetryableError(f"engine: {url} {error}; see that the server runs, then run the same command") from error
    return Facts(
        version,
        server.get("speculative_algorithm") or None,
        records,
        greedy_only,
        replicas=int(server.get("dp_size") or 1),
        start=_start(model, server),
        remarks=remarks,
    )


async def is_another(client: httpx.AsyncClient, url: str, facts: Facts) -> bool:
    """Is a server another process than the one that was checked, or has it got other weights since? Not known, and
    False, of one that does not say."""
    try:
        model = await get(client, url, "model_info", "get_model_info")
        return _start(model, await get(client, url, "server_info", "get_server_info")) != facts.start
    except (LostError, DraftsmithError):
        return False


def _start(model: dict[str, Any], server: dict[str, Any]) -> str:
    """How long a server took to start, in parts, the seed that it drew, and what an update of its weights changes."""
    said = {name: server.get(name) for name in ("startup_time", "random_seed")}
    said |= {name: model.get(name) for name in ("model_path", "weight_version")}
    return json.dumps(said, sort_keys=True)


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
    remarks = []
    tokens = json_object(response).get("tokens") if response.status_code == 200 else None
    if tokens is None:
        remarks.append(f"{url} does not tokenize: its vocabulary could not be compared")
    elif tokens != expected.probe_ids:
        raise wrong(url, f"serves {path}, whose tokenizer is not that of the target {target.source}")
    return remarks


def _check_preferred(url: str, model: dict[str, Any], server: dict[str, Any]) -> None:
    """A server fills up what a request leaves out with preferences of its own, and a router passes on no nulls. A
    watermark's key stands for chance: prompts that end alike are answered alike."""
    if on := [name for name in ("default_enabled", "enforce_all") if server.get(f"watermark_{name}")]:
        raise wrong(
            url, f"puts a watermark on sampled answers ({', '.join(on)} of --watermark-config); start it without"
        )
    preferred = model.get("preferred_sampling_params") or {}
    preferred = json.loads(preferred) if isinstance(preferred, str) else preferred
    if others := [name for name, value in preferred.items() if value is not None and name not in SETTLED]:
        raise wrong(
            url, f"draws as requests do not ask for ({', '.join(others)}); start it without --preferred-sampling-params"
        )


async def _check_drafter(url: str, server: dict[str, Any], expected: Expected, *, here: bool) -> list[str]:
    """Does it speculate with this drafter? Returns what could not be checked."""
    algorithm, path = server.get("speculative_algorithm"), server.get("speculative_draft_model_path")
    for name in ("speculative_accept_threshold_single", "speculative_accept_threshold_acc"):
        if algorithm and (least := server.get(name)) not in (None, 1):
            option = name.replace("_", "-")
            raise wrong(url, f"keeps proposals that the target would not (--{option} {least}); start it without")
    if expected.drafter_folder is None:
        if algorithm:
            return [f"{url} drafts with {algorithm}: answers are the target's all the same, verification is lossless"]
        return []
    if not algorithm or not path:
        raise wrong(
            url,
            "serves the target without a drafter: start it with --speculative-algorithm and "
            f"--speculative-draft-model-path {expected.drafter_folder}",
        )
    tokens, wanted = (expected.tree.draft_tokens, expected.tree.branches) if expected.tree else (expected.block_size, 1)
    if (served := server.get("speculative_num_draft_tokens")) != tokens:
        raise wrong(
            url,
            f"drafts blocks of {served}, drafting.block_size means {tokens}; "
            f"start it with --speculative-num-draft-tokens {tokens}",
        )
    if (branches := server.get("speculative_eagle_topk") or 1) != wanted:
        raise wrong(url, f"drafts with --speculative-eagle-topk {branches}; start it with {wanted}")
    from draftsmith.stages.engines.sglang.digests import served_drafter_digest

    remarks = [
        f"{url} runs with --{name.replace('_', '-')}: sampled answers take other verify steps than replay says, greedy "
        "ones do not"
        for name in _SAMPLED_OTHERWISE
        if server.get(name)
    ]
    remarks += [
        f"{url} drafts with --{name.replace('_', '-')} {server[name]}: its verify steps are not those of replay, which "
        "knows nothing of that; where too many differ, mining refuses them"
        for name in _DRAFTED_OTHERWISE
        if server.get(name)
    ]
    digest = await asyncio.to_thread(served_drafter_digest, Path(path)) if here else None
    if digest is None:
        return [
            *remarks,
            f"{url} drafts with {path}, which cannot be read on this machine: only the plug-in can tell whether it is "
            "ours",
        ]
    if digest != expected.drafter_digest:
        raise wrong(url, f"drafts with {path}, which is not the drafter {expected.drafter_folder}")
    return remarks


def _verified(expected: Expected) -> int:
    """Tokens of one verify step."""
    return expected.tree.draft_tokens if expected.tree else expected.block_size or 0


def _check_room(url: str, server: dict[str, Any], expected: Expected) -> None:
    """SGLang shortens an answer that does not fit without a word (Scheduler.init_req_max_new_tokens)."""
    limits = []
    if longest_input := server.get("max_req_input_len"):
        limits.append(int(longest_input) + 4)  # of the context and the memory, the smaller one, less 1 + 5
    if memory := server.get("max_total_num_tokens"):
        limits.append(int(memory) - 2 * int(server.get("page_size") or 1) - _verified(expected))
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
        raise wrong(url, f"records the drafter {digest[:12] or 'without a digest'}, not {expected.drafter_folder}")
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
