"""Softmax losses behind a frozen head, a tile of logits at a time: bound by the head's two matrix products.

The gradient of log q(token) with respect to a hidden state is the token's row of the head minus the expected row,
Σ_v q_v w_v. Both that and the log-sum-exp come from one pass over tiles of the vocabulary, as attention has it with the
head as keys and values: a tile of logits stays in the cache, and none is kept. Of two distributions the logits of a
chunk of positions are kept, in the dtype of the product, until both log-sum-exps are known: then one product gives the
gradient Σ_v (q_v - p_v) w_v, three in all. Where logits are a function of the products, each row of the head counts
with its slope.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from draftsmith.stages.drafters.head import Head
from draftsmith.stages.memory import out_of_memory, release_memory
from draftsmith.stages.targets.logits import LogitMap
from draftsmith.stages.training.chunked import slices

TOKENS_PER_TILE = 4096  # times a chunk's positions: 4 MB of bfloat16 logits for 512, which a cache holds
RUN = 64  # columns among which the greatest is looked for at once
ON_ACCELERATORS = 4  # times as many of both: kernels must be worth launching


@dataclass(frozen=True)
class Judged:
    """What one pass tells of N positions."""

    values: torch.Tensor  # [N] float32, differentiable in the hidden states
    best: torch.Tensor  # [N] the drafter's argmax, as columns of the head


def token_logprobs(hidden: torch.Tensor, head: Head, columns: torch.Tensor, positions_per_chunk: int) -> Judged:
    """log q of one token a position. hidden: [N, H]; columns: [N] of the tokens in the head, which gets no gradient."""
    return _of_chunks(
        lambda size: _TokenLogprobs.apply(hidden, head.weight, head.logit_map, columns, size),
        min(positions_per_chunk * _scale(hidden), len(hidden)),
    )


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
    return _of_chunks(
        lambda size: _ForwardKl.apply(hidden, target_hidden, *heads, temperature, size),
        min(positions_per_chunk, len(hidden)),
    )


def _of_chunks(judged: Callable[[int], tuple[torch.Tensor, torch.Tensor]], size: int) -> Judged:
    """Of chunks of so many positions; of half as many where the memory does not hold these."""
    size = max(size, 1)
    try:
        return Judged(*judged(size))
    except Exception as error:
        if not out_of_memory(error) or size < 2:
            raise
    _KEPT.held.clear()
    release_memory()  # not above: the error's frames hold what is to be given back
    return Judged(*judged(size // 2))


class _Memory:
    """A tile's products, its logits, and what the logits become, [n, tile] each: the same pages for every tile of every
    chunk. New ones would cost as much as what is computed in them."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, positions_per_chunk: int):
        size = min(len(hidden), positions_per_chunk) * min(TOKENS_PER_TILE * _scale(weight), len(weight))
        self.products = hidden.new_empty(size)
        self.logits, self.parts = (torch.empty(size, device=hidden.device) for _ in range(2))

    def product(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[n, tile] of hidden [n, H] with rows of a head [tile, H], all of one dtype."""
        return torch.mm(hidden, rows.T, out=_view(self.products, hidden, rows))

    def float32(self, products: torch.Tensor, logit_map: LogitMap) -> torch.Tensor:
        """The logits of products [n, tile], float32."""
        return logit_map(_view(self.logits, products, products.T).copy_(products))

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """float32 [n, tile] in the dtype of products, in whose place they are."""
        return _view(self.products, values, values.T).copy_(values)


class _Kept(threading.local):
    """A thread's memory for the products of a chunk with a whole head. A CPU's allocator gives so much back at once,
    and new pages are zeroed first: a sixth of a forward KL."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, size: int, like: torch.Tensor) -> torch.Tensor:
        """[size], of the dtype and device of `like`; what was taken under the name before is overwritten."""
        plain = like.device.type == "cpu" and type(like) is torch.Tensor
        held = self.held.get((name, like.dtype)) if plain else None
        if held is not None and len(held) >= size:
            return held[:size]
        made = like.new_empty(size)
        if plain and type(made) is torch.Tensor and not made.is_inference():  # such ones, and fake ones, are no others'
            self.held[name, like.dtype] = made
        return made


_KEPT = _Kept()


def _view(memory: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return memory[: len(rows) * len(columns)].view(len(rows), len(columns))


class _Softmax:
    """A softmax over the tiles that it has seen, of n positions: its sum, and where it is greatest."""

    def __init__(self, like: torch.Tensor):
        """like: [n, …], of the device."""
        self.most = torch.full((len(like),), -torch.inf, device=like.device)  # logit
        self.best = torch.zeros(len(like), dtype=torch.long, device=like.device)
        self.sum = torch.zeros_like(self.most)  # of exp(logit - most)

    def take(self, logits: torch.Tensor, first: int, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logits: float32 [n, tile] of the tokens from `first` on. parts: as long as they are, overwritten. Returns
        exp(logits - most) [n, tile], and what all that was summed before must be multiplied with [n, 1]."""
        top, column = _greatest(logits)
        self.best = torch.where(top > self.most, column + first, self.best)
        return self.add(logits, top, parts)

    def add(self, logits: torch.Tensor, top: torch.Tensor, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same where it does not matter which is the greatest. top: [n] maxima of the logits."""
        most = torch.maximum(self.most, top)
        shrunk = (self.most - most).exp()
        parts = torch.sub(logits, most[:, None], out=_view(parts, logits, logits.T)).exp_()
        self.sum = self.sum * shrunk + parts.sum(-1)
        self.most = most
        return parts, shrunk[:, None]

    @property
    def logsumexp(self) -> torch.Tensor:
        return self.most + self.sum.log()


def _greatest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of [n, tile] the maximum and its first column. Looking for both at once is slow on a CPU: the maxima
    of short runs first, then the column in one of them."""
    n, size = logits.shape
    if logits.device.type != "cpu" or size % RUN:
        top, column = logits.max(-1)
        return top, column
    runs = logits.view(n, size // RUN, RUN)
    top, run = runs.amax(-1).max(-1)
    within = runs[torch.arange(n), run].argmax(-1)
    return top, run * RUN + within


def _tiles(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    size = TOKENS_PER_TILE * _scale(weight)
    for first in range(0, weight.shape[0], size):
        yield first, weight[first : first + size]


def _scale(x: torch.Tensor) -> int:
    return 1 if x.device.type == "cpu" else ON_ACCELERATORS


def _dtype_of_products(weight: torch.Tensor) -> torch.dtype:
    """Of a training loop: its autocast's where it has one."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


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
        h = hidden.to(_dtype_of_products(weight))
        values = torch.zeros(len(h), device=h.device)
        best = torch.empty_like(columns)
        slopes = torch.empty_like(h) if ctx.needs_input_grad[0] else None  # of the values
        memory = _Memory(h, weight, positions_per_chunk)
        for part in slices(len(h), positions_per_chunk):
            softmax, expected = _Softmax(h[part]), torch.zeros(h[part].shape, device=h.device)
            for first, rows in _tiles(weight):
                rows = rows.to(h.dtype)
                logits = memory.float32(memory.product(h[part], rows), logit_map)
                place = columns[part] - first
                inside = (place >= 0) & (place < len(rows))
                here = logits.gather(1, place.clamp(0, len(rows) - 1)[:, None])[:, 0]
                values[part] = torch.where(inside, here, values[part])
                parts, shrunk = softmax.take(logits, first, memory.parts)
                if slopes is not None:
                    steep = parts if logit_map.plain else parts * logit_map.slope(logits)
                    expected.mul_(shrunk).add_(memory.rounded(steep) @ rows)
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
        h = hidden.to(_dtype_of_products(weight))
        t = target_hidden.to(target_weight.dtype)  # the training loop's autocast is for the drafter alone
        values = torch.zeros(len(h), device=h.device)
        best = torch.empty(len(h), dtype=torch.long, device=h.device)
        slopes = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        memory, theirs_memory = _Memory(h, weight, positions_per_chunk), _Memory(t, target_weight, positions_per_chunk)
        size = min(len(h), positions_per_chunk) * len(weight)
        kept, kept_theirs = _KEPT.take("ours", size, h), _KEPT.take("theirs", size, t)
        for part in slices(len(h), positions_per_chunk):
            n = len(h[part])
            q, p = _Softmax(h[part]), _Softmax(h[part])
            products = []
            for (first, rows), (_, target_rows) in zip(_tiles(weight), _tiles(target_weight), strict=True):
                at = slice(n * first, n * (first + len(rows)))
                rows = rows.to(h.dtype)
                ours = torch.mm(h[part], rows.T, out=kept[at].view(n, -1))
                theirs = torch.mm(t[part], target_rows.T, out=kept_theirs[at].view(n, -1))
                q.take(memory.float32(ours, logit_map), first, memory.parts)
                cooled = _cooled(theirs_memory.float32(theirs, target_map), temperature)
                p.add(cooled, cooled.amax(-1), memory.parts)
                products.append((rows, ours, theirs))
            best[part], total_q, total_p = q.best, q.logsumexp[:, None], p.logsumexp[:, None]
            slope = torch.zeros(h[part].shape, device=h.device)
            for rows, ours, theirs in products:
                log_q = memory.float32(ours, logit_map)
                factor = 1.0 if logit_map.plain else logit_map.slope(log_q)
                log_q.sub_(total_q)
                log_p = _cooled(theirs_memory.float32(theirs, target_map), temperature).sub_(total_p)
                probability = torch.exp(log_p, out=_view(memory.parts, log_p, log_p.T))
                values[part] += log_p.sub_(log_q).mul_(probability).sum(-1)
                if slopes is not None:
                    pull = log_q.exp_().sub_(probability)
                    slope += memory.rounded(pull if logit_map.plain else pull.mul_(factor)) @ rows
            if slopes is not None:
                slopes[part] = slope.to(slopes.dtype)
        return _known(ctx, values, best, slopes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        return _scaled(ctx, grad_outputs[0]), *[None] * 7


def _cooled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits if temperature == 1 else logits.div_(temperature)


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
