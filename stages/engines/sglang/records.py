"""Payloads for /generate, and completions from its answers: tokens checked, records cut at the answer's end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.servers.api import BadAnswerError, wrong_tokens
from draftsmith.stages.engines.servers.http import ServerAnswer
from draftsmith.stages.engines.sglang.protocol import KEY, PROTOCOL, Json
from draftsmith.stages.replay.steps import Steps, recorded_steps
from draftsmith.stages.targets.info import TargetInfo

# SGLang fills missing fields from the server's `--preferred-sampling-params`, so every field is set.
_NEUTRAL = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "min_new_tokens": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    **dict.fromkeys(("stop", "stop_regex", "logit_bias", "json_schema", "regex", "ebnf", "structural_tag")),
}


def generate_payload(request: Request, eos_ids: Sequence[int], traced: bool) -> Json:
    """Return the body of /generate for a request. traced: ask the plug-in for the verify steps."""
    sampling = request.sampling
    params: Json = {
        **_NEUTRAL,
        "temperature": sampling.temperature,
        "max_new_tokens": request.max_new_tokens,
        "stop_token_ids": list(eos_ids),
        "ignore_eos": False,
    }
    if not sampling.greedy:
        params["top_p"], params["top_k"] = sampling.top_p, sampling.top_k or -1
        params["sampling_seed"] = request.seed  # used only with --enable-deterministic-inference
    if traced:
        params["custom_params"] = {KEY: True}
    return {"input_ids": request.prompt_ids, "sampling_params": params}


def recorded_drafter(request_id: str, meta: Json) -> str | None:
    """Return the digest of the drafter that the plug-in reports; "" if it reports none, None without any record.

    Raises DraftsmithError if the plug-in uses another version of the protocol.
    """
    records = [record for record in meta.get(KEY) or () if record]
    if not records:
        return None
    if (version := records[0].get("v")) != PROTOCOL:
        raise DraftsmithError(
            f"request {request_id}: the server's plug-in records version {version}, this Draftsmith reads "
            f"{PROTOCOL}. Install the same Draftsmith in the server's environment."
        )
    return str(records[0].get("drafter") or "")


def read_completion(
    request: Request, answer: ServerAnswer, target: TargetInfo, digests: Sequence[str] = ()
) -> Completion:
    """Return the completion of a finished /generate.

    digests: what the plug-in may report for the drafter whose verify steps are read; empty: no steps are read.
    Raises BadAnswerError, which names the request, if the answer does not fit it.
    """
    try:
        body, meta = answer.body, answer.body["meta_info"]
        tokens, reason = [int(token) for token in body["output_ids"]], str(meta["finish_reason"]["type"])
        steps_counted = int(meta.get("spec_verify_ct") or 0)
        retractions = int(meta.get("num_retractions") or 0)
        accepted_counts = [int(count) for count in meta.get("spec_correct_drafts_histogram") or ()]
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswerError(
            f"request {request.request_id}: the server's answer has no {error}. Use a supported release of SGLang."
        ) from error
    matched, prompt_tokens = meta["finish_reason"].get("matched"), meta.get("prompt_tokens", len(request.prompt_ids))
    if wrong := wrong_tokens(request, tokens, reason, matched, prompt_tokens, target):
        raise BadAnswerError(f"request {request.request_id}: the server's answer {wrong}")
    steps = None
    if digests:
        drafter = recorded_drafter(request.request_id, meta)
        if drafter is not None and drafter not in digests:
            raise BadAnswerError(
                f"request {request.request_id}: its verify steps come from {drafter[:12] or 'an unnamed drafter'}, not "
                f"from {digests[0][:12]}. Start the server with that one."
            )
        steps = read_steps(request, tokens, meta)
    return Completion(
        request,
        tokens,
        reason,
        steps,
        verify_steps=len(steps or ()) or steps_counted,
        retractions=retractions,
        accepted_counts=accepted_counts,
        seconds=answer.seconds,
        first_token_seconds=answer.first_token_seconds,
    )


def read_steps(request: Request, tokens: list[int], meta: Json) -> Steps:
    """Return the verify steps of an answer from the plug-in's records, one element per output token.

    The first token comes from the prefill; every other one must belong to exactly one step. A step beyond the
    end of the answer is cut there, as in the embedded engine. Raises BadAnswerError otherwise,
    and for log-probs that are NaN.
    """
    records = meta.get(KEY) or []
    steps: list[tuple[int, int, list[int], list[float] | None]] = []
    at = 1  # the next token without a step
    for index, record in enumerate(records):
        if not record or ("anchor" not in record and "refused" not in record):
            continue
        if "refused" in record:
            raise _incomplete(request, f"no record at token {index}: {record['refused']}")
        anchor, block = int(record["anchor"]), [int(token) for token in record["block"]]
        accepted = int(record["accepted"])
        if index != at or anchor != len(request.prompt_ids) + index - 1:
            raise _incomplete(request, f"token {index} has a step with anchor {anchor}; a step at token {at} was due")
        if at >= len(tokens):
            raise _incomplete(request, f"a step at token {at}, after the last of {len(tokens)}")
        committed = min(accepted + 1, len(tokens) - at)
        if [*block[:accepted], record["bonus"]][:committed] != tokens[at : at + committed]:
            raise _incomplete(request, f"the step at token {at} has other tokens than the answer")
        logprobs = record.get("logprobs")
        # JSON has no NaN: SGLang writes null
        if any(value is None or not math.isfinite(value) for value in logprobs or ()):
            raise BadAnswerError(
                f"request {request.request_id}: the server's log-probs at token {index} are NaN, and so are its "
                "logits. Look for a dtype or a kernel that overflows."
            )
        logprobs = None if logprobs is None else [float(x) for x in logprobs]
        steps.append((anchor, min(accepted, committed), block, logprobs))
        at += committed
    if at != max(len(tokens), 1):
        raise _incomplete(request, f"they end at token {at} of {len(tokens)}")
    return recorded_steps(len(request.prompt_ids) + len(tokens), steps)


def _incomplete(request: Request, reason: str) -> BadAnswerError:
    return BadAnswerError(
        f"request {request.request_id}: the records of its verify steps do not fit its answer: {reason}. "
        "Check the plug-in's version, or remove it from the servers (mining then replays)."
    )
