"""Softmax losses behind a frozen head, a tile of logits at a time: bound by the head's two matrix products.

The gradient of log q(token) with respect to a hidden state is the token's row of the head minus the expected row,
Σ_v q_v w_v. Both that and the log-sum-exp come from one pass over tiles of the vocabulary, as attention has it with the
head as keys and values: a tile of logits stays in the cache, and none is kept. Of two distributions the logits of a
chunk of positions are kept, in the dtype of the product, until both log-sum-exps are known: then one product gives the
gradient Σ_v (q_v - p_v) w_v, three in all. Where logits are a function of the products, each row of the head counts
with its slope.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from draftsmith.stages.drafters.head import Head
from draftsmith.stages.targets.logits import LogitMap

TOKENS_PER_TILE = 4096  # times a chunk's positions: 4 MB of bfloat16 logits for 512, which a cache holds
ON_ACCELERATORS = 4  # times as many of both: kernels must be worth launching


@dataclass(frozen=True)
class Judged:
    """What one pass tells of N positions."""

    values: torch.Tensor  # [N] float32, differentiable in the hidden states
    best: torch.Tensor  # [N] the drafter's argmax, as columns of the head


def token_logprobs(hidden: torch.Tensor, head: Head, columns: torch.Tensor, positions_per_chunk: int) -> Judged:
    """log q of one token a position. hidden: [N, H]; columns: [N] of the tokens in the head, which gets no gradient."""
    return Judged(*_TokenLogprobs.apply(hidden, head.weight, head.logit_map, columns, positions_per_chunk))


def forward_kl(
    hidden: torch.Tensor,
    head: Head,
    target_hidden: torch.Tensor,
    target_head: Head,
    temperature: float,
    positions_per_chunk: int,
) -> Judged:
    """KL(p || q) of two heads over the same tokens, p at a temperature above 0. hidden, target_hidden: [N, H]."""
    heads = (head.weight, head.logit_map, target_head.weight, target_head.logit_map)
    return Judged(*_ForwardKl.apply(hidden, target_hidden, *heads, temperature, positions_per_chunk))


class _Softmax:
    """A softmax over the tiles that it has seen, of n positions: its sum, and the expectation of what it is given."""

    def __init__(self, like: torch.Tensor):
        """like: [n, …], of the device."""
        self.most = torch.full((len(like),), -torch.inf, device=like.device)  # logit
        self.best = torch.zeros(len(like), dtype=torch.long, device=like.device)
        self.sum = torch.zeros_like(self.most)  # of exp(logit - most)

    def take(self, logits: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """logits: float32 [n, tile] of the tokens from `first` on, overwritten. Returns exp(logits - most) [n, tile],
        and what all that was summed before must be multiplied with [n, 1]."""
        top, column = logits.max(-1)
        most = torch.maximum(self.most, top)
        self.best = torch.where(top > self.most, column + first, self.best)
        shrunk = (self.most - most).exp()
        parts = logits.sub_(most[:, None]).exp_()
        self.sum = self.sum * shrunk + parts.sum(-1)
        self.most = most
        return parts, shrunk[:, None]

    @property
    def logsumexp(self) -> torch.Tensor:
        return self.most + self.sum.log()


def _tiles(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    size = TOKENS_PER_TILE * _scale(weight)
    for first in range(0, weight.shape[0], size):
        yield first, weight[first : first + size]


def _chunks(hidden: torch.Tensor, positions_per_chunk: int) -> Iterator[slice]:
    count, size = len(hidden), positions_per_chunk * _scale(hidden)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _scale(x: torch.Tensor) -> int:
    return 1 if x.device.type == "cpu" else ON_ACCELERATORS


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        logit_map: LogitMap,
        columns: torch.Tensor,
        positions_per_chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h = hidden.to(weight.dtype)
        values = torch.zeros(len(h), device=h.device)
        best = torch.empty_like(columns)
        slopes = torch.empty_like(h) if ctx.needs_input_grad[0] else None  # of the values
        for part in _chunks(h, positions_per_chunk):
            softmax, expected = _Softmax(h[part]), torch.zeros(h[part].shape, device=h.device)
            for first, rows in _tiles(weight):
                logits = logit_map((h[part] @ rows.T).float())
                place = columns[part] - first
                inside = (place >= 0) & (place < len(rows))
                here = logits.gather(1, place.clamp(0, len(rows) - 1)[:, None])[:, 0]
                values[part] = torch.where(inside, here, values[part])
                slope = 1.0 if logit_map.plain else logit_map.slope(logits)
                parts, shrunk = softmax.take(logits, first)
                if slopes is not None:
                    expected.mul_(shrunk).add_((parts if logit_map.plain else parts * slope).to(rows.dtype) @ rows)
            best[part] = softmax.best
            if slopes is not None:
                own = weight[columns[part]]
                if not logit_map.plain:
                    own = own * torch.as_tensor(logit_map.slope(values[part]), device=own.device).view(-1, 1)
                slopes[part] = (own - expected / softmax.sum[:, None]).to(slopes.dtype)
            values[part] -= softmax.logsumexp
        return _known(ctx, values, best, slopes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        return _scaled(ctx, grad_outputs[0]), None, None, None, None


class _ForwardKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        target_hidden: torch.Tensor,
        weight: torch.Tensor,
        logit_map: LogitMap,
        target_weight: torch.Tensor,
        target_map: LogitMap,
        temperature: float,
        positions_per_chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h, t = hidden.to(weight.dtype), target_hidden.to(target_weight.dtype)
        values = torch.zeros(len(h), device=h.device)
        best = torch.empty(len(h), dtype=torch.long, device=h.device)
        slopes = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for start in range(0, len(h), positions_per_chunk):
            part = slice(start, start + positions_per_chunk)
            q, p = _Softmax(h[part]), _Softmax(h[part])
            kept = []
            for (first, rows), (_, target_rows) in zip(_tiles(weight), _tiles(target_weight), strict=True):
                ours = h[part] @ rows.T
                with torch.autocast(h.device.type, enabled=False):  # the training loop's is for the drafter alone
                    theirs = t[part] @ target_rows.T
                q.take(logit_map(ours.to(torch.float32, copy=True)), first)
                p.take(target_map(theirs.to(torch.float32, copy=True)).div_(temperature), first)
                kept.append((rows, ours, theirs))
            best[part], total_q, total_p = q.best, q.logsumexp[:, None], p.logsumexp[:, None]
            slope = torch.zeros(h[part].shape, device=h.device)
            for rows, ours, theirs in kept:
                log_q = logit_map(ours.to(torch.float32, copy=True))
                factor = 1.0 if logit_map.plain else logit_map.slope(log_q)
                log_q.sub_(total_q)
                log_p = target_map(theirs.to(torch.float32, copy=True)).div_(temperature).sub_(total_p)
                probability = log_p.exp()
                values[part] += log_p.sub_(log_q).mul_(probability).sum(-1)
                if slopes is not None:
                    pull = log_q.exp_().sub_(probability)
                    slope += (pull if logit_map.plain else pull.mul_(factor)).to(rows.dtype) @ rows
            if slopes is not None:
                slopes[part] = slope.to(slopes.dtype)
        return _known(ctx, values, best, slopes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        return _scaled(ctx, grad_outputs[0]), *[None] * 7


def _known(
    ctx: Any, values: torch.Tensor, best: torch.Tensor, slopes: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the gradient of each value with respect to its hidden state [N, H] for backward."""
    ctx.mark_non_differentiable(best)
    if slopes is not None:
        ctx.save_for_backward(slopes)
    return values, best


def _scaled(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    (slopes,) = ctx.saved_tensors
    scaled: torch.Tensor = slopes.float() * grad[:, None]
    return scaled
