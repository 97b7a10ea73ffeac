"""Are logged answers this target's, sampled as the config says? Its own log-probs of them tell.

Greedy answers hold no token that the target clearly would not have chosen. Of sampled ones the log-prob is what the
distribution expects of itself: minus the entropy at every position, give or take its standard deviation (a sum over
hundreds of tokens is normal enough), and none is what top-k or top-p leave out. Found so: sampled rows among greedy
ones and the other way round, rows of a wider top-p or top-k, another model's text, an answer whose beginning (the
reasoning) was cut out. Retokenised text and near-ties of other kernels are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from draftsmith.stages.target.sampling import SamplingParams

if TYPE_CHECKING:
    from draftsmith.stages.target.causal_lm import Target

GAP = 1.0  # nats below the best token: no near-tie of another kernel or dtype
UNCHOSEN_SHARE, UNCHOSEN_LEAST = 0.03, 2  # tokens of a greedy answer that may be farther below: seams of tokens
DEVIATIONS = 6.0  # of a sampled answer's log-prob from what is expected of it
BEGINNING = 8  # tokens that are also judged alone
OUTSIDE_SHARE, OUTSIDE_LEAST = 0.01, 2  # tokens of a sampled answer that may be left out,
EDGE = 0.25  # with this part of what top-p leaves out, and of top-k, added to them: another kernel's edge is not ours
_POSITIONS = 512  # whose logits are in memory at once

LIKELY, UNLIKELY, OTHER_BEGINNING, TOO_LIKELY = "", "improbable", "improbable beginning", "more probable than sampled"
OUTSIDE = "outside top_p or top_k"


@torch.no_grad()
def judge(target: Target, prompt: Sequence[int], response: Sequence[int], sampling: SamplingParams) -> str:
    """What speaks against an answer, one of the words above; empty if nothing does."""
    ids = torch.tensor([[*prompt, *response]], device=target.device)
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
        known = torch.where(probs > 0, logprobs, 0.0)
        entropy = -(probs * known).sum(-1)
        surprises.append(-logprobs.gather(-1, chosen)[:, 0] - entropy)  # zero on average
        variances.append((probs * known.square()).sum(-1) - entropy.square())
        better = probs > probs.gather(-1, chosen)
        likelier.append((probs * better).sum(-1))
        ranks.append(better.sum(-1))
    if sampling.greedy:
        return _of_greedy(torch.cat(gaps))
    said = _of_sampled(torch.cat(surprises), torch.cat(variances), sampling)
    return said or _of_nucleus(torch.cat(likelier), torch.cat(ranks), sampling)


def _of_greedy(gaps: torch.Tensor) -> str:
    unchosen = gaps > GAP
    if int(unchosen.sum()) >= max(UNCHOSEN_LEAST, UNCHOSEN_SHARE * len(gaps)):
        return UNLIKELY
    return OTHER_BEGINNING if bool(unchosen[0]) else LIKELY


def _of_sampled(surprises: torch.Tensor, variances: torch.Tensor, sampling: SamplingParams) -> str:
    # a little is added: of a certain position the variance is zero, and another kernel's log-prob is not quite ours
    deviations = surprises.sum() / (variances.sum() + 0.01 * len(variances)).sqrt()
    if deviations > DEVIATIONS:
        return UNLIKELY
    if deviations < -DEVIATIONS and not sampling.truncates:  # what is cut off makes answers more probable by itself
        return TOO_LIKELY
    beginning = surprises[:BEGINNING].sum() / (variances[:BEGINNING].sum() + 1.0).sqrt()
    return OTHER_BEGINNING if beginning > DEVIATIONS else LIKELY


def _of_nucleus(likelier: torch.Tensor, ranks: torch.Tensor, sampling: SamplingParams) -> str:
    """likelier: how probable, at each position, anything better than its token is; ranks: how many tokens are. top-p is
    held against the whole distribution, not against what top-k keeps of it: some engines do so, and leave out less."""
    outside = torch.zeros_like(ranks, dtype=torch.bool)
    if sampling.top_p < 1:
        outside |= likelier >= sampling.top_p + EDGE * (1 - sampling.top_p)
    if sampling.top_k:
        outside |= ranks >= (1 + EDGE) * sampling.top_k
    return OUTSIDE if int(outside.sum()) >= max(OUTSIDE_LEAST, OUTSIDE_SHARE * len(outside)) else LIKELY
