"""Tests with the target's log-probs whether answers are its own; if too many are not, says what they look like."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.chat_template import SWITCHES, TemplateInverter, token_ids
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.row_files import describe_counts
from draftsmith.stages.runtime.statistics import CONFIDENCE, share_interval
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import SamplingParams

GAP = 1.0  # nats below the best token: more than near-ties of another kernel or dtype
UNCHOSEN_SHARE, UNCHOSEN_MIN = 0.03, 2  # fewer tokens of a greedy answer may be farther below: retokenised text
DEVIATIONS = 6.0  # tolerated standard deviations of a sampled answer's log-prob from its expectation
BEGINNING = 8  # first tokens, which are also tested separately
_POSITIONS = 512  # positions whose logits are in memory together

LIKELY, UNLIKELY, OTHER_BEGINNING, TOO_LIKELY = "", "improbable", "improbable beginning", "more probable than sampled"

_TEMPERATURES = (0.3, 0.6, 0.7, 0.8, 1.0, 1.2)  # that services use
_LOOKED_AT = 8  # foreign answers that are read again to say what they look like
_EXPLAINED = 0.75  # share of these that an explanation must make likely
_BEGINNING_TIMES = 2.0  # ratio of nats per token to those of the rest: above it, the prompt was another one


class ReadAnswer(NamedTuple):
    """An answer that the target has read."""

    prompt: Sequence[int]
    answer: Sequence[int]
    reason: str  # of `check_likelihood`


def read_answer(target: Target, prompt: Sequence[int], answer: Sequence[int], sampling: SamplingParams) -> ReadAnswer:
    """Test an answer, and keep it for `foreign_error`."""
    return ReadAnswer(prompt, answer, check_likelihood(target, prompt, answer, sampling))


def describe_foreign(config: LogsConfig, read: Sequence[ReadAnswer]) -> str:
    """Return how many answers are foreign, with the interval of their share, and why; empty if none is."""
    reasons = Counter(answer.reason for answer in read if answer.reason)
    if not reasons:
        return ""
    count, sampling = reasons.total(), f"temperature {config.temperature:g}"
    if config.temperature:
        sampling += f", {config.sampling.truncation}"
    low, high = share_interval(count, len(read))
    return (
        f"{count} of {len(read)} answers ({count / len(read):.0%}; {low:.0%} to {high:.0%} of all at {CONFIDENCE:.0%} "
        f"confidence) are not what this target gives at {sampling} ({describe_counts(reasons)})"
    )


def foreign_error(target: Target, config: LogsConfig, read: Sequence[ReadAnswer]) -> str | None:
    """Return the error if significantly more answers are foreign than `max_foreign_share` allows.

    The lower end of the share's interval is compared: if the true share is just allowed, one run in forty stops.
    """
    foreign = [answer for answer in read if answer.reason]
    if not foreign or share_interval(len(foreign), len(read))[0] <= config.max_foreign_share:
        return None
    return (
        f"{describe_foreign(config, read)}, over logs.max_foreign_share {config.max_foreign_share:g}. "
        f"{_likeness(target, config, foreign[:_LOOKED_AT])}"
    )


def _likeness(target: Target, config: LogsConfig, foreign: Sequence[ReadAnswer]) -> str:
    """Return what foreign answers look like, and what to set: the first explanation under which most are likely."""
    sampled = [*_TEMPERATURES, *([config.temperature] if config.temperature else [])]
    read = [_read(target, answer.prompt, answer.answer, sampled) for answer in foreign]

    def explained(reasons: Iterable[str]) -> bool:
        return list(reasons).count(LIKELY) >= _EXPLAINED * len(foreign)

    if config.temperature and explained(_check_greedy(values[0]) for values in read):
        return "They look greedy. Set logs.temperature: 0."
    for advice, prompts in _other_prompts(target, config, foreign):
        if explained(
            check_likelihood(target, prompt, answer.answer, config.sampling)
            for prompt, answer in zip(prompts, foreign, strict=True)
        ):
            return advice
    logprobs = torch.stack([values[1::3].sum(-1) for values in read]).sum(0)  # by temperature
    temperature = sampled[int(logprobs.argmax())]
    other = replace(config.sampling, temperature=temperature)
    if explained(check_likelihood(target, answer.prompt, answer.answer, other) for answer in foreign):
        return (
            f"They look sampled at a temperature of about {temperature:g}, or given by a close copy (quantised, "
            "another revision). Set logs.temperature, top_p and top_k, or target to that copy."
        )
    # nats, [N] of each answer
    excess = [values[0] if config.sampling.greedy else -values[-3] - values[-2] for values in read]
    beginning, rest = (
        float(torch.cat([nats[part] for nats in excess]).mean()) for part in (slice(BEGINNING), slice(BEGINNING, None))
    )
    if beginning > _BEGINNING_TIMES * rest:
        return (
            "They look like answers after another chat template, system prompt or question, or without their "
            "beginning. Set logs.chat_template_kwargs as your service does, or log token ids."
        )
    return (
        "They look like another model's, or another revision's. Set target to the model that gave them, or exclude "
        "them with logs.filter or logs.since."
    )


def _other_prompts(
    target: Target, config: LogsConfig, foreign: Sequence[ReadAnswer]
) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield pairs of advice and prompts; the advice is right if the answers are likely after these prompts.

    They are the same messages under another switch of the chat template, or as plain text.
    """
    inverter = TemplateInverter(target.tokenizer, config.chat_template_kwargs)
    messages = [inverter.messages(answer.prompt) for answer in foreign]
    for switch in SWITCHES:
        kwargs = {**config.chat_template_kwargs, **switch}
        with suppress(DraftsmithError):
            prompts = [token_ids(target.tokenizer, turns, "logs", kwargs) for turns in messages]
            setting = ", ".join(f"{name}: {json.dumps(value)}" for name, value in kwargs.items())
            yield (
                f"They look like answers after another chat template. Set logs.chat_template_kwargs: {{{setting}}}.",
                prompts,
            )
    texts = ["\n\n".join(turn["content"] for turn in turns) for turns in messages]
    plain = [list(target.tokenizer(text)["input_ids"]) for text in texts]
    if all(plain):
        yield (
            "They look like answers to plain text, without the chat template. Log token ids (prompt_token_ids, "
            "completion_token_ids), or exclude them with logs.filter or logs.since.",
            plain,
        )


def check_likelihood(target: Target, prompt: Sequence[int], answer: Sequence[int], sampling: SamplingParams) -> str:
    """Return the reason against an answer, one of the constants above; empty if there is none.

    Greedy answers have no token that the target clearly would not have chosen. For sampled answers, the expected log-
    prob is minus the entropy, summed over the positions. A sum over hundreds of tokens is close to normal, so its
    deviation is measured in standard deviations. The check finds sampled rows among greedy ones and the reverse,
    another model's answers, and answers whose beginning (the reasoning) was removed. It tolerates retokenised text and
    near-ties of other kernels.
    """
    gaps, *sampled = _read(target, prompt, answer, [] if sampling.greedy else [sampling.temperature])
    if sampling.greedy:
        return _check_greedy(gaps)
    logprobs, entropies, variances = sampled
    return _check_sampled(-logprobs - entropies, variances, sampling)


@torch.no_grad()
def _read(target: Target, prompt: Sequence[int], answer: Sequence[int], temperatures: Sequence[float]) -> torch.Tensor:
    """Return [1 + 3 * temperatures, N] of an answer's N tokens, in nats: how far the logit is below the best one; and
    for each temperature the log-prob, the entropy, and the variance of log-probs."""
    ids = torch.tensor([[*prompt, *answer]], device=target.device)
    hidden = target.read(ids).hidden[0, len(prompt) - 1 : -1]  # before each token of the answer
    tokens, parts = ids[0, len(prompt) :], []
    for start in range(0, len(tokens), _POSITIONS):
        logits = target.logits(hidden[start : start + _POSITIONS])
        chosen = tokens[start : start + _POSITIONS, None]
        part = [logits.max(-1).values - logits.gather(-1, chosen)[:, 0]]
        for temperature in temperatures:
            logprobs = torch.log_softmax(logits / temperature, -1)
            probs = logprobs.exp()
            finite = torch.where(probs > 0, logprobs, 0.0)
            entropy = -(probs * finite).sum(-1)
            part += [logprobs.gather(-1, chosen)[:, 0], entropy, (probs * finite.square()).sum(-1) - entropy.square()]
        parts.append(torch.stack(part))
    return torch.cat(parts, -1)


def _check_greedy(gaps: torch.Tensor) -> str:
    """Classify a greedy answer by how far (nats, [N]) each token's logit is below the best one."""
    unchosen = gaps > GAP
    if int(unchosen.sum()) >= max(UNCHOSEN_MIN, UNCHOSEN_SHARE * len(gaps)):
        return UNLIKELY
    return OTHER_BEGINNING if bool(unchosen[0]) else LIKELY


def _check_sampled(surprises: torch.Tensor, variances: torch.Tensor, sampling: SamplingParams) -> str:
    """Classify a sampled answer by [N] surprisals minus entropies and their variances."""
    # a little is added: a certain position has variance zero, and another kernel's log-prob is not quite ours
    deviations = surprises.sum() / (variances.sum() + 0.01 * len(variances)).sqrt()
    if deviations > DEVIATIONS:
        return UNLIKELY
    if deviations < -DEVIATIONS and not sampling.truncates:  # truncation by itself makes answers more probable
        return TOO_LIKELY
    beginning = surprises[:BEGINNING].sum() / (variances[:BEGINNING].sum() + 1.0).sqrt()
    return OTHER_BEGINNING if beginning > DEVIATIONS else LIKELY
