"""Bodies for vLLM's /v1/completions, and completions from its answers, with the reported verify steps.

[README.md](README.md#verify-steps) shows how anchors follow from them.
"""

from __future__ import annotations

from collections.abc import Sequence

from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.servers.api import BadAnswerError, wrong_tokens
from draftsmith.stages.engines.servers.http import Json, ServerAnswer
from draftsmith.stages.replay.steps import Steps, recorded_steps
from draftsmith.stages.targets.info import TargetInfo

# vLLM fills missing fields from the checkpoint's generation_config.json, so every field is set.
_NEUTRAL = {
    "n": 1,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "min_tokens": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
}


def completion_payload(request: Request, eos_ids: Sequence[int]) -> Json:
    """Return the body of /v1/completions for a request."""
    sampling = request.sampling
    payload: Json = {
        **_NEUTRAL,
        "prompt": request.prompt_ids,
        "max_tokens": request.max_new_tokens,
        "temperature": sampling.temperature,
        "stop_token_ids": list(eos_ids),
        "return_token_ids": True,
    }
    if not sampling.greedy:
        payload |= {"top_p": sampling.top_p, "top_k": sampling.top_k, "seed": request.seed}
    return payload


class UnreadStepsError(Exception):
    """The verify steps of an answer are not consecutive whole blocks; the message is the reason."""


def drafting_metrics(body: Json) -> Json | None:
    """Return the metrics of an answer's verify steps; None from a server that does not draft or report them."""
    return (body.get("metrics") or {}).get("speculative_decoding")


def read_completion(request: Request, answer: ServerAnswer, target: TargetInfo) -> Completion:
    """Return the completion of an answer, with the number of its verify steps but not the steps.

    Raises BadAnswerError, which names the request, if the answer does not fit it.
    """
    body, name = answer.body, f"request {request.request_id}: the server's answer"
    try:
        choices, metrics = body["choices"], drafting_metrics(body)
        counted = int(metrics["num_spec_steps"]) if metrics else 0
        accepted_counts = [int(count) for count in metrics["acceptance_histogram"]] if metrics else []
        if len(choices) > 1:
            raise BadAnswerError(f"{name} is one of several (n > 1).")
        if not choices or (reason := choices[0].get("finish_reason")) is None:
            raise BadAnswerError(f"{name} is a chunk of a streamed answer.")
        prompt, tokens = (choices[0].get(field) for field in ("prompt_token_ids", "token_ids"))
        if prompt is None or tokens is None:
            raise BadAnswerError(f"{name} has no token ids (return_token_ids).")
        tokens, stop_reason = [int(token) for token in tokens], choices[0].get("stop_reason")
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswerError(f"{name} has no {error}. Use a supported release of vLLM.") from error
    if wrong := wrong_tokens(request, tokens, reason, stop_reason, len(prompt), target):
        raise BadAnswerError(f"{name} {wrong}")
    return Completion(
        request,
        tokens,
        reason,
        verify_steps=counted,
        accepted_counts=accepted_counts,
        seconds=answer.seconds,
        first_token_seconds=answer.first_token_seconds,
    )


def read_steps(request: Request, tokens: Sequence[int], metrics: Json) -> Steps:
    """Return the verify steps of an answer, without their proposals, cut at the end of the answer.

    Raises UnreadStepsError if the steps are not reported one by one, if they do not commit every token after the first,
    or if the server drafted fewer proposals in some of them.
    """
    counts = [metrics.get(name) or [] for name in ("per_step_accepted", "per_step_drafted")]  # missing without steps
    if len(counts[0]) != metrics["num_spec_steps"]:
        raise UnreadStepsError("the server reports only their number (--per-request-spec-decode-metrics detailed)")
    width, at = int(metrics["num_spec_tokens"]), 1  # at: the next token without a step
    steps: list[tuple[int, int, list[int], None]] = []
    for accepted, drafted in zip(*counts, strict=True):
        left = len(tokens) - at
        if left <= 0:
            raise UnreadStepsError("they commit more tokens than the answer has")
        if drafted < min(width, left):  # proposals after the answer's end do not count
            raise UnreadStepsError("adaptive width: the server drafted fewer proposals in some steps")
        committed = min(accepted + 1, left)
        steps.append((len(request.prompt_ids) + at - 1, min(accepted, committed), [], None))
        at += committed
    if at < len(tokens):
        raise UnreadStepsError("they commit fewer tokens than the answer has, so the request was preempted")
    return recorded_steps(len(request.prompt_ids) + len(tokens), steps)
