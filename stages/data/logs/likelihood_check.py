"""Checks with the target's log-probs whether logged answers are its own, sampled as the config says.

Greedy answers have no token that the target clearly would not have chosen. For sampled answers, the expected log-prob
is minus the entropy, summed over the positions. A sum over hundreds of tokens is close to normal, so its deviation is
measured in standard deviations; and no token is one that top-k or top-p exclude. The check finds sampled rows among
greedy ones and the reverse, rows of a wider top-p or top-k, another model's answers, and answers whose beginning (the
reasoning) was removed. It tolerates retokenised text and near-ties of other kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.sampling import SamplingParams

GAP = 1.0  # nats below the best token: more than near-ties of another kernel or dtype
UNCHOSEN_SHARE, UNCHOSEN_MIN = 0.03, 2  # tokens of a greedy answer that may be farther below: seams of tokens
DEVIATIONS = 6.0  # of a sampled answer's log-prob from its expectation
BEGINNING = 8  # tokens that are also tested alone
OUTSIDE_SHARE, OUTSIDE_MIN = 0.01, 2  # tokens of a sampled answer that top-k or top-p may exclude,
EDGE = 0.25  # after both are widened by this share, since another kernel's edge is not exactly ours
_POSITIONS = 512  # whose logits are in memory together

LIKELY, UNLIKELY, OTHER_BEGINNING, TOO_LIKELY = "", "improbable", "improbable beginning", "more probable than sampled"
OUTSIDE = "outside top_p or top_k"


@torch.no_grad()
def check_likelihood(target: Target, prompt: Sequence[int], answer: Sequence[int], sampling: SamplingParams) -> str:
    """Return what speaks against an answer, one of the constants above; empty if nothing does."""
    ids = torch.tensor([[*prompt, *answer]], device=target.device)
    hidden = target.read(ids).hidden[0, len(prompt) - 1 : -1]  # of the positions before each token of the answer
    tokens = ids[0, len(prompt) :]
    gaps, surprises, variances, likelier, ranks = [], [], [], [], []
    for start in range(0, len(tokens), _POSITIONS):
        logits = target.logits(hidden[start : start + _POSITIONS])
        chosen = tokens[start : start + _POSITIONS, None]
        if sampling.greedy:
            gaps.append(logits.max(-1).values - logits.gather(-1, chosen)[:, 0])
            continue
        logprobs = torch.log_softmax(logits / sampling.temperature, -1)
        probs = logprobs.exp()
        finite = torch.where(probs > 0, logprobs, 0.0)
        entropy = -(probs * finite).sum(-1)
        surprises.append(-logprobs.gather(-1, chosen)[:, 0] - entropy)  # zero on average
        variances.append((probs * finite.square()).sum(-1) - entropy.square())
        better = probs > probs.gather(-1, chosen)
        likelier.append((probs * better).sum(-1))
        ranks.append(better.sum(-1))
    if sampling.greedy:
        return _check_greedy(torch.cat(gaps))
    reason = _check_sampled(torch.cat(surprises), torch.cat(variances), sampling)
    return reason or _check_truncation(torch.cat(likelier), torch.cat(ranks), sampling)


def _check_greedy(gaps: torch.Tensor) -> str:
    """Check [N] nats by which each token's logit is below the best one."""
    unchosen = gaps > GAP
    if int(unchosen.sum()) >= max(UNCHOSEN_MIN, UNCHOSEN_SHARE * len(gaps)):
        return UNLIKELY
    return OTHER_BEGINNING if bool(unchosen[0]) else LIKELY


def _check_sampled(surprises: torch.Tensor, variances: torch.Tensor, sampling: SamplingParams) -> str:
    """Check [N] negative log-probs less the entropy, with their variances."""
    # a little is added: a certain position has variance zero, and another kernel's log-prob is not quite ours
    deviations = surprises.sum() / (variances.sum() + 0.01 * len(variances)).sqrt()
    if deviations > DEVIATIONS:
        return UNLIKELY
    if deviations < -DEVIATIONS and not sampling.truncates:  # truncation by itself makes answers more probable
        return TOO_LIKELY
    beginning = surprises[:BEGINNING].sum() / (variances[:BEGINNING].sum() + 1.0).sqrt()
    return OTHER_BEGINNING if beginning > DEVIATIONS else LIKELY


def _check_truncation(likelier: torch.Tensor, ranks: torch.Tensor, sampling: SamplingParams) -> str:
    """Check that top-k and top-p allow the tokens.

    likelier: [N] total probability of the tokens that are more probable than the answer's. ranks: [N] their number.
    top-p is compared with the whole distribution, not with what top-k leaves of it: some engines do so, and exclude
    less.
    """
    outside = torch.zeros_like(ranks, dtype=torch.bool)
    if sampling.top_p < 1:
        outside |= likelier >= sampling.top_p + EDGE * (1 - sampling.top_p)
    if sampling.top_k:
        outside |= ranks >= (1 + EDGE) * sampling.top_k
    return OUTSIDE if int(outside.sum()) >= max(OUTSIDE_MIN, OUTSIDE_SHARE * len(outside)) else LIKELY
