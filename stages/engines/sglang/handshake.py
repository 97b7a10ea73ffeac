"""What a server must be before it is asked: the same model, vocabulary and drafter, and room for the longest request.

All of it is read from what the server says and from a short generation. The target is loaded here only for a server
whose weights neither lie on this machine nor have a revision (`probe.py`).
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.engines.base import Request, SamplingParams
from draftsmith.stages.engines.config import NO_CUTTING, NO_REDUCED_HEAD, SGLangEngineConfig, TreeConfig
from draftsmith.stages.engines.sglang import probe
from draftsmith.stages.engines.sglang.client import LostError, check_status
from draftsmith.stages.engines.sglang.records import completion_of, generate_payload, trace_identity
from draftsmith.stages.engines.sglang.server import algorithm_of, block_size_of
from draftsmith.stages.targets.info import TargetInfo, model_path, read_target_info
from draftsmith.stages.targets.resolve import load_tokenizer

if TYPE_CHECKING:
    import httpx

PROBE_TEXT = "What is 12 + 30?\n\tNaïve café, 3.14 °C; 你好, привет."  # cut differently by different tokenizers
_PROBE_TOKENS = 8
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 120.0  # a first generation may compile kernels


@dataclass(frozen=True)
class Expected:
    """What the servers are for."""

    target: TargetInfo
    target_folder: Path  # its artifact
    model_folder: Path
    probe_ids: list[int]  # PROBE_TEXT in the target's tokenizer, no special tokens
    scored_ids: list[int]  # the text of `probe.py`, likewise
    longest: int  # positions of the longest request
    drafter_folder: Path | None = None
    drafter_digest: str | None = None
    algorithm: str | None = None
    block_size: int | None = None
    tree: TreeConfig | None = None
    trace: bool = False  # whether records are wanted
    stream: bool = False

    @classmethod
    def of(
        cls,
        config: SGLangEngineConfig,
        *,
        target_folder: Path,
        drafter_folder: Path | None,
        drafting: DraftingConfig,
        longest: int,
        stream: bool,
    ) -> Expected:
        """Raises DraftsmithError if the drafter is made for another target, or cannot draft as the config says."""
        target, model_folder = read_target_info(target_folder), model_path(target_folder)
        tokenizer = load_tokenizer(model_folder)
        probe_ids, scored_ids = (tokenizer.encode(text, add_special_tokens=False) for text in (PROBE_TEXT, probe.TEXT))
        expected = cls(target, target_folder, model_folder, probe_ids, scored_ids, longest, stream=stream)
        if drafter_folder is None:
            return expected
        from draftsmith.stages.drafters.checkpoint import check_drafter, check_layers
        from draftsmith.stages.drafters.digest import drafter_digest

        if drafting.head_tokens is not None:
            raise DraftsmithError(f"drafting.head_tokens: {NO_REDUCED_HEAD}")
        if drafting.confidence is not None:
            raise DraftsmithError(f"drafting.confidence: {NO_CUTTING}")
        check_drafter(drafter_folder, target.digest)
        check_layers(drafter_folder, target.num_layers)
        algorithm = algorithm_of(drafter_folder, config.launch)
        return replace(
            expected,
            drafter_folder=drafter_folder,
            drafter_digest=drafter_digest(drafter_folder),
            algorithm=algorithm,
            block_size=block_size_of(drafter_folder, drafting, algorithm),
            tree=(tree := config.launch.tree if config.launch else None),
            trace=config.trace and tree is None,
        )


@dataclass(frozen=True)
class Facts:
    """What a server said of itself."""

    version: str
    algorithm: str | None  # of speculative decoding
    device: str
    records_trace: bool
    replicas: int = 1  # of the model
    remarks: list[str] = field(default_factory=list)  # what could not be checked, or is worth knowing

    @property
    def greedy_only(self) -> bool:
        """On a CPU SGLang verifies greedily, whatever the temperature: sampled answers would follow another law."""
        return self.algorithm is not None and self.device == "cpu"


async def shake_hands(client: httpx.AsyncClient, url: str, expected: Expected) -> Facts:
    """Check one server. Raises RetryableError if it does not answer, DraftsmithError if it is the wrong one."""
    try:
        model = await _get(client, url, "model_info", "get_model_info")
        server = await _get(client, url, "server_info", "get_server_info")
        remarks = await _check_model(client, url, model, expected)
        remarks += await _check_weights(client, url, str(model.get("model_path")), server, expected)
        remarks += _check_drafter(url, server, expected)
        _check_room(url, server, expected)
        if expected.stream and server.get("incremental_streaming_output"):
            raise _wrong(url, "streams increments; start it without --incremental-streaming-output")
        records = await _check_generation(client, url, server, expected)
    except LostError as error:
        raise RetryableError(f"engine: {url} {error}; see that the server runs, then run the same command") from error
    algorithm = server.get("speculative_algorithm") or None
    replicas = int(server.get("dp_size") or 1)
    return Facts(str(server.get("version", "?")), algorithm, str(server.get("device", "?")), records, replicas, remarks)


async def records_through(client: httpx.AsyncClient, url: str, expected: Expected) -> bool:
    """Do answers come with records of their verify steps through this router, whose servers are checked?"""
    try:
        return await _check_generation(client, url, {}, expected)
    except LostError as error:
        raise RetryableError(f"engine: {url} {error}; see that the router runs, then run the same command") from error


async def _get(client: httpx.AsyncClient, url: str, *names: str) -> dict[str, Any]:
    """The first of several endpoints (their names differ between releases) that is there."""
    for name in names:
        response = await _send(client, "GET", f"{url}/{name}")
        if response.status_code != 404:
            check_status(name, url, response.status_code, response.text)
            return _json(response)
    raise _wrong(url, f"has no /{names[0]}: is it a SGLang server of a supported release?")


async def _send(client: httpx.AsyncClient, method: str, url: str, body: dict[str, Any] | None = None) -> httpx.Response:
    import httpx

    try:
        return await client.request(method, url, json=body, timeout=_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise LostError(f"cannot be reached ({type(error).__name__} {error})") from error


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DraftsmithError(f"engine: {response.url} gives no JSON object: is it a SGLang server?")
    return found


async def _check_model(client: httpx.AsyncClient, url: str, model: dict[str, Any], expected: Expected) -> list[str]:
    """Is it the target? Returns what could not be checked."""
    target, path = expected.target, str(model.get("model_path"))
    if model.get("is_generation") is False:
        raise _wrong(url, f"serves {path}, which does not generate")
    served = {"model_type": model.get("model_type"), "architectures": model.get("architectures")}
    if served["model_type"] not in (None, target.model_type) or (
        served["architectures"] and target.architecture not in served["architectures"]
    ):
        raise _wrong(
            url,
            f"serves {path} ({served['model_type']}, {served['architectures']}), "
            f"the target is {target.source} ({target.model_type}, {target.architecture})",
        )
    response = await _send(client, "POST", f"{url}/tokenize", {"prompt": PROBE_TEXT, "add_special_tokens": False})
    remarks = []
    tokens = _json(response).get("tokens") if response.status_code == 200 else None
    if tokens is None:
        remarks.append(f"{url} does not tokenize: its vocabulary could not be compared")
    elif tokens != expected.probe_ids:
        raise _wrong(url, f"serves {path}, whose tokenizer is not that of the target {target.source}")
    return remarks


async def _check_weights(
    client: httpx.AsyncClient, url: str, path: str, server: dict[str, Any], expected: Expected
) -> list[str]:
    """Are they the target's? By the files where they lie here, else by the hub's commit, else by what it computes.

    Returns what could not be checked.
    """
    target, folder = expected.target, Path(path)
    if folder.is_dir():
        if folder.resolve() != expected.model_folder.resolve():
            from draftsmith.stages.targets.info import model_digest
            from draftsmith.stages.targets.source import weight_files

            if await asyncio.to_thread(model_digest, folder, weight_files(folder)) != target.digest:
                raise _wrong(
                    url, f"serves {path}, whose config or weights differ from the target {expected.model_folder}"
                )
        return []
    revision = str(server.get("revision") or "")
    if path == target.source and _COMMIT.fullmatch(revision) and target.revision is not None:
        if revision != target.revision:
            raise _wrong(
                url, f"serves {path} of revision {revision}, the target is revision {target.revision}; start it with "
                f"--revision {target.revision}, or set target.revision"
            )  # fmt: skip
        return []
    return await _check_logprobs(client, url, path, server, expected)


async def _check_logprobs(
    client: httpx.AsyncClient, url: str, path: str, server: dict[str, Any], expected: Expected
) -> list[str]:
    """Does it say of fixed tokens what the target says of them? Returns what could not be checked."""
    target, tokens = expected.target, expected.scored_ids
    if quantization := server.get("quantization"):
        return [f"{url} serves {path} quantised ({quantization}): its weights could not be compared with the target's"]
    response = await _send(client, "POST", f"{url}/generate", probe.payload(tokens))
    check_status("of the handshake", url, response.status_code, response.text)
    theirs = probe.served_logprobs(_json(response), tokens)
    if theirs is None:
        return [f"{url} gives no log-probs of a prompt: the weights of {path} could not be compared with the target's"]
    ours = await asyncio.to_thread(probe.own_logprobs, expected.target_folder, tokens)
    difference = probe.mean_difference(ours, theirs)
    allowed = probe.tolerance(target.dtype, server.get("dtype"))
    if difference > allowed:
        raise _wrong(
            url,
            f"serves {path}, whose log-probs of {len(ours)} fixed tokens are {difference:.3g} nats from those of the "
            f"target {target.source} in the mean (rounding is at most {allowed:g}): other weights; serve revision "
            f"{target.revision or target.digest[:12]}",
        )
    return [f"{url} serves {path}: log-probs of {len(ours)} fixed tokens are {difference:.2g} nats from the target's"]


def _check_drafter(url: str, server: dict[str, Any], expected: Expected) -> list[str]:
    """Does it speculate with this drafter? Returns what could not be checked."""
    algorithm, path = server.get("speculative_algorithm"), server.get("speculative_draft_model_path")
    for name in ("speculative_accept_threshold_single", "speculative_accept_threshold_acc"):
        if algorithm and (least := server.get(name)) not in (None, 1):
            option = name.replace("_", "-")
            raise _wrong(url, f"keeps proposals that the target would not (--{option} {least}); start it without")
    if expected.drafter_folder is None:
        if algorithm:
            return [f"{url} drafts with {algorithm}: answers are the target's all the same, verification is lossless"]
        return []
    if not algorithm or not path:
        raise _wrong(
            url,
            "serves the target without a drafter: start it with --speculative-algorithm and "
            f"--speculative-draft-model-path {expected.drafter_folder}",
        )
    tokens, wanted = (expected.tree.draft_tokens, expected.tree.branches) if expected.tree else (expected.block_size, 1)
    if (served := server.get("speculative_num_draft_tokens")) != tokens:
        raise _wrong(
            url,
            f"drafts blocks of {served}, drafting.block_size means {tokens}; "
            f"start it with --speculative-num-draft-tokens {tokens}",
        )
    if (branches := server.get("speculative_eagle_topk") or 1) != wanted:
        raise _wrong(url, f"drafts with --speculative-eagle-topk {branches}; start it with {wanted}")
    if not Path(path).is_dir():
        return [f"{url} drafts with {path}, which is not on this machine: only the plug-in can tell whether it is ours"]
    from draftsmith.stages.drafters.digest import drafter_digest

    if drafter_digest(Path(path)) != expected.drafter_digest:
        raise _wrong(url, f"drafts with {path}, which is not the drafter {expected.drafter_folder}")
    return []


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
        raise _wrong(
            url,
            f"has room for {min(limits)} positions a request, the longest needs {expected.longest}; lower "
            "sampling.max_new_tokens or prompts.max_prompt_tokens, or raise --context-length or --max-total-tokens",
        )


async def _check_generation(client: httpx.AsyncClient, url: str, server: dict[str, Any], expected: Expected) -> bool:
    """A greedy generation: are its tokens of this vocabulary? Returns whether it came with records of its steps."""
    request = Request("of the handshake", expected.probe_ids, SamplingParams(_PROBE_TOKENS))
    traced = expected.trace and expected.drafter_folder is not None
    payload = generate_payload(request, expected.target.eos_ids, traced)
    payload["sampling_params"]["ignore_eos"] = True  # or the answer may be too short to see a verify step
    payload["sampling_params"].pop("stop_token_ids")
    response = await _send(client, "POST", f"{url}/generate", payload)
    check_status(request.request_id, url, response.status_code, response.text)
    body = _json(response)
    meta = body.get("meta_info") or {}
    digest = trace_identity(request.request_id, meta) if traced else None
    if digest is not None and digest != expected.drafter_digest:
        raise _wrong(url, f"records the drafter {digest[:12] or 'without a digest'}, not {expected.drafter_folder}")
    completion_of(
        request,
        body,
        eos_ids=expected.target.eos_ids,
        vocab_size=expected.target.vocab_size,
        records_of=digest,
    )
    if server.get("speculative_algorithm") and not meta.get("spec_verify_ct"):
        raise _wrong(url, "does not say how many verify steps a request took (spec_verify_ct): use a supported release")
    return digest is not None


def _wrong(url: str, what: str) -> DraftsmithError:
    return DraftsmithError(f"engine: the server {url} {what}")
