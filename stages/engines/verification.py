"""Proposals of requests in flight, and which of them the target keeps.

Greedy requests, and drafters that propose their argmax, keep what equals the target's own token. Where a drafter draws
its proposals from a q of its own, the rule is that of speculative sampling (arXiv 2211.17192): keep x with probability
min(1, p(x) / q(x)), else draw from max(p - q, 0). What is committed follows p either way. A position is decided once:
proposals behind a rejection decide nothing, so the next block may draw there with the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import (
    Purpose,
    argmax,
    probabilities,
    sample_inverse_cdf,
    sampling_distribution,
    scatter_to_vocab,
    uniform,
)
from draftsmith.stages.target.sampling import SamplingParams


@dataclass(frozen=True)
class Drafted:
    """A block a row."""

    tokens: torch.Tensor  # [n, K]
    distributions: dict[int, torch.Tensor] = field(default_factory=dict)  # row -> q [K, V] float64, if sampled


@dataclass(frozen=True)
class Verified:
    """What the target says of it."""

    tokens: torch.Tensor  # [n, K + 1]; of a row the first accepted + 1 are committed
    accepted: list[int]


@torch.no_grad()
def draft(
    drafter: Drafter,
    context: Context,
    anchor_tokens: torch.Tensor,
    anchors: torch.Tensor,
    block_size: int,
    head: Head,
    vocabulary: int,
    sampling: Sequence[SamplingParams],
    seeds: Sequence[int],
) -> Drafted:
    """A block behind the anchor of each row. anchor_tokens, anchors: [n, 1]."""
    rows = [row for row, params in enumerate(sampling) if drafter.samples_proposals and not params.greedy]
    if not rows:  # argmaxes, also where the drafter could draw
        return Drafted(drafter.propose(context, anchor_tokens, anchors, block_size, head)[:, 0])
    drafting = drafter.block_sampler(context, anchor_tokens, anchors, block_size, head)
    temperatures = torch.tensor([sampling[row].temperature for row in rows], device=anchors.device)[:, None]
    at = anchors[:, 0].tolist()  # once: each would wait for the device
    numbers = torch.tensor(
        [[uniform(seeds[row], at[row] + k, Purpose.PROPOSAL) for k in range(1, block_size)] for row in rows],
        dtype=torch.float64,
        device=anchors.device,
    )
    tokens, distributions = [anchor_tokens], []
    for k in range(block_size - 1):
        logits = drafting.logits(tokens[-1])[:, 0]
        columns = logits.argmax(-1)
        q = probabilities(logits[rows], temperatures)
        columns[rows] = sample_inverse_cdf(q, numbers[:, k])
        distributions.append(scatter_to_vocab(q, head.token_ids, vocabulary))
        tokens.append(head.to_tokens(columns)[:, None])
    of_rows = torch.stack(distributions, 1)  # [rows, K, V]
    return Drafted(torch.cat(tokens[1:], 1), dict(zip(rows, of_rows, strict=True)))


def draw(
    logits: torch.Tensor, positions: torch.Tensor, sampling: Sequence[SamplingParams], seeds: Sequence[int]
) -> torch.Tensor:
    """Return [n, T] the target's tokens of several rows: greedy, or with one uniform number a (seed, position).

    logits: [n, T, V]; positions: [n, T] of the tokens. Verification of proposals that are an argmax accepts one iff it
    is this token, so that speculative decoding gives the tokens of plain decoding.
    """
    tokens = argmax(logits)
    rows = [row for row, params in enumerate(sampling) if not params.greedy]
    at = positions.tolist() if rows else []
    for row in rows:
        p = sampling_distribution(logits[row], sampling[row])
        tokens[row] = sample_inverse_cdf(p, torch.tensor([uniform(seeds[row], each) for each in at[row]]).double())
    return tokens


def verify(
    drafted: Drafted,
    logits: torch.Tensor,
    positions: torch.Tensor,
    sampling: Sequence[SamplingParams],
    seeds: Sequence[int],
) -> Verified:
    """logits: [n, K + 1, V] of the target behind the anchor and each proposal; positions: [n, K + 1] of what they
    predict."""
    tokens = torch.zeros_like(positions)
    accepted = [0] * len(sampling)
    point = [row for row in range(len(sampling)) if row not in drafted.distributions]
    if point:
        of_point = logits[point] if drafted.distributions else logits
        drawn = draw(of_point, positions[point], [sampling[r] for r in point], [seeds[r] for r in point])
        equal = (drafted.tokens[point] == drawn[:, :-1]).long().cumprod(1).sum(1).tolist()
        tokens[point] = drawn
        for row, count in zip(point, equal, strict=True):
            accepted[row] = count
    first = positions[:, 0].tolist()
    for row, q in drafted.distributions.items():
        p = sampling_distribution(logits[row], sampling[row])
        kept, behind = _by_ratio(drafted.tokens[row], p, q, first[row], seeds[row])
        tokens[row, :kept], tokens[row, kept], accepted[row] = drafted.tokens[row, :kept], behind, kept
    return Verified(tokens, accepted)


def _by_ratio(
    proposed: torch.Tensor, p: torch.Tensor, q: torch.Tensor, first: int, seed: int
) -> tuple[int, torch.Tensor]:
    """Proposals kept, and the token behind them. proposed [K], p [K + 1, V], q [K, V]; first: position of the first."""
    ratios = (p[:-1].gather(1, proposed[:, None]) / q.gather(1, proposed[:, None]))[:, 0].tolist()
    for k, ratio in enumerate(ratios):
        if uniform(seed, first + k, Purpose.ACCEPT) >= ratio:
            rest, number = (p[k] - q[k]).clamp(min=0), uniform(seed, first + k, Purpose.RESIDUAL)
            return k, sample_inverse_cdf(rest, torch.tensor(number, dtype=rest.dtype))
    return len(ratios), sample_inverse_cdf(p[-1], torch.tensor(uniform(seed, first + len(ratios)), dtype=p.dtype))
