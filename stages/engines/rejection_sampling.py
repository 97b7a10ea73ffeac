"""Drafting of blocks for requests in flight, and their verification by the target: rejection sampling.

Greedy requests, and drafters that propose argmaxes, accept a proposal that equals the target's token. Where a drafter
samples its proposals from a distribution q, the rule is that of speculative sampling (arXiv 2211.17192): accept x with
probability min(1, p(x) / q(x)), else sample from max(p - q, 0). Committed tokens follow p either way. A position is
decided once: proposals after a rejection do not count, so the next block may use their random
numbers again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from draftsmith.stages.drafters.base import Context, PreparedDrafter
from draftsmith.stages.drafters.sampling import (
    Purpose,
    argmax,
    probabilities,
    sample_inverse_cdf,
    sampling_distribution,
    scatter_to_vocab,
    uniform,
)
from draftsmith.stages.engines.base import Request


@dataclass(frozen=True)
class Drafted:
    """The proposals of one block per row."""

    tokens: torch.Tensor  # [n, K]
    distributions: dict[int, torch.Tensor] = field(default_factory=dict)  # row -> q [K, V] float64, if sampled


@dataclass(frozen=True)
class Verification:
    """The target's decision on one block per row."""

    tokens: torch.Tensor  # [n, K + 1]; the first accepted + 1 of a row are committed
    accepted: list[int]  # [n]


@torch.no_grad()
def propose_blocks(
    drafter: PreparedDrafter,
    context: Context,
    anchor_tokens: torch.Tensor,
    anchors: torch.Tensor,
    requests: Sequence[Request],
    vocabulary: int,
) -> Drafted:
    """Draft a block after the anchor of each request. anchor_tokens, anchors: [n, 1]. vocabulary: the target's size."""
    samples = drafter.drafter.samples_proposals
    rows = [row for row, request in enumerate(requests) if samples and not request.sampling.greedy]
    if not rows:
        return Drafted(drafter.propose(context, anchor_tokens, anchors)[:, 0])
    sampler, head, K = drafter.sampler(context, anchor_tokens, anchors), drafter.head, drafter.block_size - 1
    temperatures = torch.tensor([requests[row].sampling.temperature for row in rows], device=anchors.device)[:, None]
    at = anchors[:, 0].tolist()  # one transfer: every transfer waits for the device
    numbers = torch.tensor(
        [[uniform(requests[row].seed, at[row] + k, Purpose.PROPOSAL) for k in range(1, K + 1)] for row in rows],
        dtype=torch.float64,
        device=anchors.device,
    )
    tokens, distributions = [anchor_tokens], []
    for k in range(K):
        logits = sampler.logits(tokens[-1])[:, 0]
        columns = logits.argmax(-1)
        q = probabilities(logits[rows], temperatures)
        columns[rows] = sample_inverse_cdf(q, numbers[:, k])
        distributions.append(scatter_to_vocab(q, head.token_ids, vocabulary))
        tokens.append(head.to_tokens(columns)[:, None])
    by_row = torch.stack(distributions, 1)  # [rows, K, V]
    return Drafted(torch.cat(tokens[1:], 1), dict(zip(rows, by_row, strict=True)))


def sample_target(logits: torch.Tensor, positions: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Return the target's tokens [n, T]: argmaxes, or sampled with one uniform number per seed and position.

    logits: [n, T, V]; positions: [n, T] of the tokens. A proposal that is an argmax is accepted if it equals this
    token, so that speculative decoding gives the tokens of decoding without a drafter.
    """
    tokens = argmax(logits)
    rows = [row for row, request in enumerate(requests) if not request.sampling.greedy]
    at = positions.tolist() if rows else []
    for row in rows:
        p = sampling_distribution(logits[row], requests[row].sampling)
        numbers = torch.tensor([uniform(requests[row].seed, position) for position in at[row]]).double()
        tokens[row] = sample_inverse_cdf(p, numbers)
    return tokens


def verify(
    drafted: Drafted, logits: torch.Tensor, positions: torch.Tensor, requests: Sequence[Request]
) -> Verification:
    """Verify one block per request.

    logits: [n, K + 1, V] of the target after the anchor and each proposal. positions: [n, K + 1] predicted positions.
    """
    tokens = torch.zeros_like(positions)
    accepted = [0] * len(requests)
    argmaxes = [row for row in range(len(requests)) if row not in drafted.distributions]
    if argmaxes:
        their_logits = logits[argmaxes] if drafted.distributions else logits
        sampled = sample_target(their_logits, positions[argmaxes], [requests[row] for row in argmaxes])
        equal = (drafted.tokens[argmaxes] == sampled[:, :-1]).long().cumprod(1).sum(1).tolist()
        tokens[argmaxes] = sampled
        for row, count in zip(argmaxes, equal, strict=True):
            accepted[row] = count
    first = positions[:, 0].tolist()
    for row, q in drafted.distributions.items():
        p = sampling_distribution(logits[row], requests[row].sampling)
        count, following = _verify_sampled(drafted.tokens[row], p, q, first[row], requests[row].seed)
        tokens[row, :count], tokens[row, count], accepted[row] = drafted.tokens[row, :count], following, count
    return Verification(tokens, accepted)


def _verify_sampled(
    proposed: torch.Tensor, p: torch.Tensor, q: torch.Tensor, first: int, seed: int
) -> tuple[int, torch.Tensor]:
    """Return the number of accepted proposals, and the token after them.

    proposed: [K]; p: [K + 1, V]; q: [K, V]; first: position of the first proposal.
    """
    ratios = (p[:-1].gather(1, proposed[:, None]) / q.gather(1, proposed[:, None]))[:, 0].tolist()
    for k, ratio in enumerate(ratios):
        if uniform(seed, first + k, Purpose.ACCEPT) >= ratio:
            rest, number = (p[k] - q[k]).clamp(min=0), uniform(seed, first + k, Purpose.RESIDUAL)
            return k, sample_inverse_cdf(rest, torch.tensor(number, dtype=rest.dtype))
    return len(ratios), sample_inverse_cdf(p[-1], torch.tensor(uniform(seed, first + len(ratios)), dtype=p.dtype))
