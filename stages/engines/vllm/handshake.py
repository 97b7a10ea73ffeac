"""Checks of a vLLM server before its first request: same model, reported verify steps, enough context.

A stock server reports little about itself, so its answers are compared. They cannot show its drafter; parity with
replay does (`stages/replay/parity.py`, `draftsmith diagnose`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import httpx

from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.config import Options
from draftsmith.stages.engines.servers.api import ServerInfo
from draftsmith.stages.engines.servers.http import (
    Json,
    RefusedRequestError,
    ServerAnswer,
    check_status,
    get_json,
    json_object,
    query,
    reachable,
    wrong_server,
)
from draftsmith.stages.engines.servers.identity import (
    ServedTarget,
    check_tokenizer,
    check_weights,
    launched_target,
)
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.engines.vllm.records import completion_payload, drafting_metrics, read_completion

FIRST = (0, 29)  # the first release that reports verify steps
_PROBE_TOKENS = 8
_NAME = "of the handshake"
_CACHE_DTYPE = re.compile(r'^vllm:cache_config_info\{.*\bcache_dtype="(\w+)"', re.MULTILINE)


async def check_server(
    client: httpx.AsyncClient,
    url: str,
    required: ServerRequirements,
    log: Callable[[str], None],
    *,
    ours: bool,
    options: Options | None = None,
) -> ServerInfo:
    """Check one server. Raises RetryableError if it does not answer, DraftsmithError if it is the wrong one.

    ours: it was started here, so its files are the right ones. options: its options in that case.
    """
    with reachable(url):
        version = str((await get_json(client, url, "version")).get("version", "?"))
        if (release := re.match(r"(\d+)\.(\d+)", version)) and tuple(map(int, release.groups())) < FIRST:
            raise wrong_server(url, f"is vLLM {version}, which reports no verify steps. Use 0.29 or later.")
        card = dict((await get_json(client, url, "v1/models"))["data"][0])
        path = str(card.get("root") or card.get("id"))
        served = launched_target(options or {}, url, path) if ours else await reported_target(client, url, path)
        remarks = [] if ours else await check_tokenizer(client, url, served.path, required)
        scored = partial(_served_logprobs, client, url, required.scored_ids)
        compared, difference = await check_weights(served, scored, required, log)
        remarks += compared
        if (limit := card.get("max_model_len")) is not None and required.longest > limit:
            raise wrong_server(
                url,
                f"takes {limit} positions per request, the longest needs {required.longest}. Lower "
                "sampling.max_new_tokens or prompts.max_prompt_tokens, or raise --max-model-len.",
            )
        request = Request(_NAME, required.probe_ids, _PROBE_TOKENS)
        answer = await _generate(client, url, request)
        read_completion(request, ServerAnswer(answer), required.target)
        metrics = drafting_metrics(answer)
        remarks += _check_drafter(url, metrics, required)
        if required.drafter_folder is not None and not ours:
            remarks.append(f"{url}: only parity with replay can tell whether it drafts with {required.drafter_folder}")
    records = metrics is not None and "per_step_accepted" in metrics
    return ServerInfo(version, records, remarks=remarks, target_difference=difference)


async def reported_target(client: httpx.AsyncClient, url: str, path: str = "") -> ServedTarget:
    """Return a server's report: only the dtype of its cache from a stock server, its config in development mode."""
    response = await query(client, "GET", f"{url}/server_info?config_format=json")
    if response.status_code == 200:
        config = json_object(response)["vllm_config"]
        model, cache = config["model_config"], config["cache_config"]
        dtype = str(model["dtype"]).removeprefix("torch.")
        return ServedTarget(url, path, dtype, model.get("quantization"), cache["cache_dtype"])
    match = _CACHE_DTYPE.search((await query(client, "GET", f"{url}/metrics")).text)
    return ServedTarget(url, path, "auto", kv_cache_dtype=match[1] if match else None)


async def is_vllm(client: httpx.AsyncClient, url: str) -> bool:
    """Return whether a server is vLLM's. Raises RequestLostError if it does not answer."""
    response = await query(client, "GET", f"{url}/v1/models")
    if response.status_code == 404:
        return False
    check_status(_NAME, url, response.status_code, response.text)
    return any(dict(card).get("owned_by") == "vllm" for card in json_object(response).get("data") or ())


async def served_block_size(client: httpx.AsyncClient, url: str) -> int | None:
    """Return the tokens of a verify step, with the anchor; None from a server that reports none."""
    metrics = drafting_metrics(await _generate(client, url, Request(_NAME, [0], _PROBE_TOKENS)))
    return int(metrics["num_spec_tokens"]) + 1 if metrics else None


def _check_drafter(url: str, metrics: Json | None, required: ServerRequirements) -> list[str]:
    """Check that the server drafts as required. Returns remarks."""
    if required.block_size is None:
        return [f"{url} drafts: answers are the target's all the same, verification is lossless"] if metrics else []
    if metrics is None:
        raise wrong_server(
            url,
            "reports no verify steps. Start it with --speculative-config, which names the drafter, and with "
            "--per-request-spec-decode-metrics detailed.",
        )
    if (proposals := metrics.get("num_spec_tokens")) != required.block_size - 1:
        raise wrong_server(
            url,
            f"drafts {proposals} tokens per step, drafting.block_size means {required.block_size - 1}. Start it with "
            "that num_speculative_tokens in --speculative-config.",
        )
    return []


async def _generate(client: httpx.AsyncClient, url: str, request: Request, **fields: object) -> Json:
    """Send a request whose answer is not cut by an end token, and return the answer."""
    payload = completion_payload(request, ()) | {"ignore_eos": True} | fields
    response = await query(client, "POST", f"{url}/v1/completions", payload)
    check_status(request.request_id, url, response.status_code, response.text)
    return json_object(response)


async def _served_logprobs(client: httpx.AsyncClient, url: str, tokens: Sequence[int]) -> list[float] | None:
    """Return the log-probs of `tokens` after the first; None if one is missing."""
    try:
        answer = await _generate(client, url, Request(_NAME, list(tokens), 1), prompt_logprobs=0)
        scored = answer["choices"][0]["prompt_logprobs"]
        logprobs = [float(at[str(token)]["logprob"]) for at, token in zip(scored[1:], tokens[1:], strict=True)]
    except (RefusedRequestError, KeyError, IndexError, TypeError, ValueError):
        return None
    return logprobs if all(map(math.isfinite, logprobs)) else None
