"""What a server must be before it is asked: the same model and drafter, and room for the longest request.

All of it is read from what the server says and from short generations. Of a server that somebody else started the
tokenizer and the weights are compared too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.config import NO_REDUCED_HEAD, SGLangEngineConfig
from draftsmith.stages.engines.sglang import probe
from draftsmith.stages.engines.sglang.client import LostError, away, get, json_object, send, wrong
from draftsmith.stages.engines.sglang.protocol import SUPPORTED, supported
from draftsmith.stages.engines.sglang.records import completion_of, trace_identity
from draftsmith.stages.engines.sglang.server import algorithm_of, block_size_of
from draftsmith.stages.target.info import TargetInfo, model_path, read_target_info
from draftsmith.stages.target.resolve import load_tokenizer

if TYPE_CHECKING:
    import httpx

PROBE_TEXT = "What is 12 + 30?\n\tNaïve café, 3.14 °C; 你好, привет."  # cut differently by different tokenizers
_PROBE_TOKENS = 8


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
        """Return what a config asks of its servers.

        Raises DraftsmithError if the drafter is made for another target, or cannot draft as the config says.
        """
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
        check_drafter(drafter_folder, target.digest)
        check_layers(drafter_folder, target.num_layers)
        algorithm = algorithm_of(drafter_folder)
        return replace(
            expected,
            drafter_folder=drafter_folder,
            drafter_digest=drafter_digest(drafter_folder),
            algorithm=algorithm,
            block_size=block_size_of(drafter_folder, drafting, algorithm),
            trace=config.trace,
        )


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
            path, target = str(model.get("model_path")), expected.target
            remarks += await _check_tokenizer(client, url, path, expected)
            remarks += await probe.check_weights(
                client, url, path, server, target, expected.target_folder, expected.scored_ids, log
            )
        remarks += _check_drafter(url, server, expected)
        _check_room(url, server, expected)
        records = await _check_generation(client, url, server, expected)
        if expected.drafter_folder is not None and not records and not ours:
            drafter = server.get("speculative_draft_model_path")
            remarks.append(
                f"{url} drafts with {drafter}: only the plug-in could tell whether it is {expected.drafter_folder}"
            )
        greedy_only = await _is_greedy_only(client, url, server, expected)
    except LostError as error:
        raise away(url, error) from error
    return ServerInfo(version, records, greedy_only, replicas=int(server.get("dp_size") or 1), remarks=remarks)


async def records_through(client: httpx.AsyncClient, url: str, expected: Expected) -> bool:
    """Return whether answers come through this router, whose servers are checked, with records of their steps."""
    try:
        return await _check_generation(client, url, {}, expected)
    except LostError as error:
        raise away(url, error) from error


async def _check_tokenizer(client: httpx.AsyncClient, url: str, path: str, expected: Expected) -> list[str]:
    """Compare a server's tokenizer with the target's. Returns what could not be checked."""
    response = await send(client, "POST", f"{url}/tokenize", {"prompt": PROBE_TEXT, "add_special_tokens": False})
    tokens = json_object(response).get("tokens") if response.status_code == 200 else None
    if tokens is None:
        return [f"{url} does not tokenize: its vocabulary could not be compared"]
    if tokens != expected.probe_ids:
        raise wrong(url, f"serves {path}, whose tokenizer is not that of the target {expected.target.source}")
    return []


def _check_drafter(url: str, server: dict[str, Any], expected: Expected) -> list[str]:
    """Check that it drafts as it should. Returns what is worth knowing."""
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
    """Check that the longest request fits: SGLang shortens answers in silence (Scheduler.init_req_max_new_tokens)."""
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
    """Generate greedily; the tokens must be of the vocabulary. Returns whether records of the steps came with them."""
    request = Request("of the handshake", expected.probe_ids, _PROBE_TOKENS)
    traced = expected.trace and expected.drafter_folder is not None
    body = await probe.generate(client, url, request, traced=traced)
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
    """Return whether it verifies greedily. A CPU is not asked: a sampled request ends a server of DSPARK there."""
    if not server.get("speculative_algorithm"):
        return False
    return server.get("device") == "cpu" or await probe.verifies_greedily(
        client, url, expected.target, expected.probe_ids
    )
