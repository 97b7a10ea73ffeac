"""A request as /generate takes it, and its answer as a completion: tokens checked, records cut where it ends."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.base import Completion, Request, VerifyStep
from draftsmith.stages.engines.sglang.protocol import KEY, PROTOCOL

# SGLang fills up what a request leaves out with the server's `--preferred-sampling-params`: nothing is left out.
_NUMBERS = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "min_new_tokens": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
}
_NULLS = dict.fromkeys(("stop", "stop_regex", "logit_bias", "json_schema", "regex", "ebnf", "structural_tag"))


def generate_payload(request: Request, eos_ids: Sequence[int], traced: bool) -> dict[str, Any]:
    """The body of /generate for a request."""
    sampling = request.sampling
    params: dict[str, Any] = {
        **_NUMBERS,
        **_NULLS,
        "temperature": sampling.temperature,
        "max_new_tokens": request.max_new_tokens,
        "stop_token_ids": list(eos_ids),
        "ignore_eos": False,
    }
    if not sampling.greedy:
        params["top_p"], params["top_k"] = sampling.top_p, sampling.top_k or -1
        params["sampling_seed"] = request.seed  # heeded with --enable-deterministic-inference
    if traced:
        params["custom_params"] = {KEY: True}
    return {"input_ids": request.prompt_ids, "sampling_params": params}


class BadAnswerError(DraftsmithError):
    """An answer is not what was asked for."""


class IncompleteRecordsError(BadAnswerError):
    """The records of an answer do not cover all of its tokens."""


def trace_identity(request_id: str, meta: dict[str, Any]) -> str | None:
    """Digest of the drafter that the plug-in says it serves ("" if it does not say); None without any record.

    Raises DraftsmithError if the plug-in speaks another version.
    """
    records = [record for record in meta.get(KEY) or () if record]
    if not records:
        return None
    if (version := records[0].get("v")) != PROTOCOL:
        raise DraftsmithError(
            f"request {request_id}: the server's plug-in records version {version}, this Draftsmith reads "
            f"{PROTOCOL}; install the same Draftsmith in the server's environment"
        )
    return str(records[0].get("drafter") or "")


def completion_of(
    request: Request,
    body: dict[str, Any],
    *,
    eos_ids: Collection[int],
    vocab_size: int,
    records_of: str | None = None,
    seconds: float = 0.0,
    first_token_seconds: float = float("nan"),
) -> Completion:
    """Read a finished /generate answer.

    records_of: digest of the drafter whose verify steps are read; None: they are not wanted.
    Raises BadAnswerError, naming the request, if it is not what was asked for.
    """
    try:
        meta = body["meta_info"]
        tokens, reason = [int(token) for token in body["output_ids"]], str(meta["finish_reason"]["type"])
        steps_counted = int(meta.get("spec_verify_ct") or 0)
        retractions = int(meta.get("num_retractions") or 0)
        accepted_counts = [int(count) for count in meta.get("spec_correct_drafts_histogram") or ()]
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswerError(
            f"request {request.request_id}: the server's answer has no {error}; is this a supported SGLang release?"
        ) from error
    _check_tokens(request, tokens, reason, meta, eos_ids, vocab_size)
    steps = []
    if records_of is not None:
        drafter = trace_identity(request.request_id, meta)
        if drafter not in (None, records_of):
            raise BadAnswerError(
                f"request {request.request_id}: its verify steps are of the drafter "
                f"{drafter[:12] or 'without a digest'}, not of {records_of[:12]}: start the server with that one again"
            )
        steps = read_steps(request, tokens, meta)
    return Completion(
        request,
        tokens,
        reason,
        steps,
        verify_steps=len(steps) or steps_counted,
        retractions=retractions,
        accepted_counts=accepted_counts,
        seconds=seconds,
        first_token_seconds=first_token_seconds,
    )


def _check_tokens(
    request: Request, tokens: list[int], reason: str, meta: dict[str, Any], eos_ids: Collection[int], vocab_size: int
) -> None:
    wrong, matched = None, meta["finish_reason"].get("matched")
    if not tokens:
        wrong = "is empty"
    elif not all(0 <= token < vocab_size for token in tokens):
        wrong = f"has token {max(tokens)}, the target's vocabulary ends at {vocab_size - 1}: another model is served"
    elif meta.get("prompt_tokens", len(request.prompt_ids)) != len(request.prompt_ids):
        wrong = f"is to {meta['prompt_tokens']} prompt tokens, {len(request.prompt_ids)} were sent"
    elif reason == "stop" and tokens[-1] not in eos_ids:
        wrong = f"ends at token {tokens[-1]}, which is no end token of the target: the server has other stop tokens"
    elif reason == "stop" and matched not in (None, tokens[-1]):
        # SGLang puts an end token over one that is outside the vocabulary, and says so here alone.
        wrong = f"was ended by {matched!r}, not by its last token: by a stop string, or by an error of the server"
    elif reason == "length" and len(tokens) < request.max_new_tokens:
        wrong = (
            f"was cut after {len(tokens)} of {request.max_new_tokens} tokens: "
            "the server's context or key/value memory is too small; raise it or lower sampling.max_new_tokens"
        )
    elif reason not in ("stop", "length"):
        wrong = f"ended by {reason!r}"
    if wrong:
        raise BadAnswerError(f"request {request.request_id}: the server's answer {wrong}")


def read_steps(request: Request, tokens: list[int], meta: dict[str, Any]) -> list[VerifyStep]:
    """The verify steps of an answer from the plug-in's records, one element an output token.

    The first token comes from reading the prompt; every other one must belong to exactly one step. A step that went
    past the end of the answer is cut there, as the embedded engine does. Raises IncompleteRecordsError otherwise,
    BadAnswerError for log-probs that are NaN.
    """
    records = meta.get(KEY) or []
    steps: list[VerifyStep] = []
    at = 1  # the next token without a step
    for index, record in enumerate(records):
        if not record or ("anchor" not in record and "refused" not in record):
            continue
        if "refused" in record:
            raise _incomplete(request, f"no record at token {index}: {record['refused']}")
        anchor, block, kept = int(record["anchor"]), [int(token) for token in record["block"]], int(record["accepted"])
        if index != at or anchor != len(request.prompt_ids) + index - 1:
            raise _incomplete(request, f"token {index} has a step with anchor {anchor}; a step at token {at} was due")
        if at >= len(tokens):
            raise _incomplete(request, f"a step at token {at} of {len(tokens)}")
        committed = min(kept + 1, len(tokens) - at)
        accepted = min(kept, committed)
        if [*block[:kept], record["bonus"]][:committed] != tokens[at : at + committed]:
            raise _incomplete(request, f"the step at token {at} says other tokens than the answer has")
        if (logprobs := record.get("logprobs")) is not None and not all(map(_is_number, logprobs)):
            raise BadAnswerError(
                f"request {request.request_id}: the server's log-probs at token {index} are no numbers, so that the "
                "answer is no use: its logits are NaN; look for a dtype or a kernel that overflows"
            )
        steps.append(VerifyStep(anchor, accepted, block, None if logprobs is None else [float(x) for x in logprobs]))
        at += committed
    if at != max(len(tokens), 1):
        raise _incomplete(request, f"they end at token {at} of {len(tokens)}")
    return steps


def _is_number(value: float | None) -> bool:
    """JSON has no NaN: SGLang writes null."""
    return value is not None and math.isfinite(value)


def _incomplete(request: Request, what: str) -> IncompleteRecordsError:
    return IncompleteRecordsError(
        f"request {request.request_id}: the records of its verify steps do not fit its answer: {what}; "
        "check the plug-in's version, or set engine.trace: false (mining then replays)"
    )
