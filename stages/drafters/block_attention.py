"""Attention of blocks: each over the part of a shared prefix that it may see, and over itself, never over another.

A dense mask over prefix and all blocks would have (A · S) · (T + A · J) entries, nearly all of them false, for other
blocks. On CUDA flex attention (arXiv 2412.05496) skips what is false. Elsewhere prefix and blocks are computed
separately, each by the fused kernel, and merged by their log-sum-exp; the kernel's backward takes the gradient of each
from the output and the log-sum-exp of the whole, as ring attention does (arXiv 2310.01889). Either way work is linear
in the number of blocks and in what a block sees of the prefix, and backward needs inputs, output and a log-sum-exp: no
scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from draftsmith.stages.drafters.compiled import compiled
from draftsmith.stages.runtime.memory import to_device

KeysValues = tuple[torch.Tensor, torch.Tensor]

_HIDDEN = -1e9  # added to masked scores; finite, so that a block that sees nothing of the prefix gives no NaN
# Limit of the prefix's mask, in entries. Blocks are read in groups, and a group reads no further than its last block.
_MASK_ENTRIES = 2**22

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class ContextMask:
    """What the blocks of a batch see of the prefix and of themselves.

    Entry i of a prefix is position i. Query s of a block is at position seen + s of its row: it sees entries below
    `seen`, and all keys of its own block.
    """

    seen: torch.Tensor  # [B, A] integers
    first: torch.Tensor | None = None  # [B, A]: no query sees an entry before it; None: from the beginning
    # A layer's sliding window: positions that a query sees, counted backwards from its own, which is included.
    window: int | None = None
    causal: bool = False  # a query sees no own key after itself
    # The prefix is a ring: entry i holds the newest position below `seen` that is i modulo the ring's length.
    ring: bool = False
    _masks: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @cached_property
    def bounds(self) -> np.ndarray:
        """Return [2, B, A]: the first entry that any query of a block may see, and the one after the last."""
        seen = np.array(self.seen.tolist())
        first = np.zeros_like(seen) if self.first is None else np.array(self.first.tolist())
        if self.window is not None:
            first = np.maximum(first, seen - self.window + 1)
        return np.stack([first.clip(min=0), seen])

    def visible(
        self, entries: slice, queries: int, rows: slice = slice(None), group: slice = slice(None)
    ) -> torch.Tensor | None:
        """Return the mask of `sees`; None if all queries see everything.

        It reads the bounds on the host; on CUDA this would wait for all queued kernels.
        """
        first, end = self.bounds[:, rows, group]
        within = self.window is None or end.max() + queries - 1 - self.window < entries.start
        if not self.ring and within and first.max() <= entries.start and end.min() >= entries.stop:
            return None
        return self.sees(entries, queries, rows, group)

    def sees(self, entries: slice, queries: int, rows: slice = slice(None), group: slice = slice(None)) -> torch.Tensor:
        """Return bool [B, A, S or 1, entries]: the entries of the prefix that each query of these blocks sees.

        It has one row for all queries if they see the same entries.
        """
        seen = self.seen[rows, group, None, None]
        at = torch.arange(entries.start, entries.stop, device=seen.device)
        if self.ring:
            at = seen - 1 - (seen - 1 - at) % entries.stop
        sees = (at < seen) & (at >= 0)
        if self.first is not None:
            sees = sees & (at >= self.first[rows, group, None, None])
        if self.window is not None:
            s = torch.arange(queries, device=seen.device)[:, None]
            sees = sees & (at > seen + s - self.window)
        return sees

    def own(self, queries: int, keys: int) -> torch.Tensor | None:
        """Return bool [S, J]: the keys of its own block that a query sees; None: all."""
        if not self.causal and (self.window is None or self.window >= queries):
            return None
        distance = torch.arange(queries, device=self.seen.device)[:, None] - torch.arange(keys, device=self.seen.device)
        sees = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        return sees if self.window is None else sees & (distance < self.window)

    def block_mask(self, T: int, S: int, J: int) -> Any:
        """Return flex attention's mask of A · S queries over T entries of a prefix and A · J of blocks.

        It is the same in all layers.
        """
        if (T, S, J) not in self._masks:
            B, A = self.seen.shape
            # tensors: numbers would be compiled in, and every new length would compile again
            device = self.seen.device
            window_or_all = T + S + J if self.window is None else self.window
            own_ahead = 0 if self.causal else J  # keys after itself that a query sees in its block
            prefix, queries, own, window, ahead = to_device([T, S, J, window_or_all, own_ahead], device)
            seen, first = self.seen, torch.zeros_like(self.seen) if self.first is None else self.first

            def sees(b: torch.Tensor, _h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
                block, s = q // queries, q % queries
                end = seen[b, block]
                sees_prefix = (k < end) & (k >= first[b, block]) & (k > end + s - window)
                j = (k - prefix) % own
                sees_block = ((k - prefix) // own == block) & (j <= s + ahead) & (s - j < window)
                return torch.where(k < prefix, sees_prefix, sees_block)

            _, create_mask = _flex()
            self._masks[T, S, J] = create_mask(sees, B, None, A * S, T + A * J, device)
        return self._masks[T, S, J]

    def chunks(self, T: int, R: int) -> list[tuple[slice, slice, slice]]:
        """Return the chunks to read together: rows, neighbouring blocks in them, and the entries of T that these see.

        Blocks of R queries each are read together while their mask stays small. With windows, the entries between them
        must also be few: then the window bounds the work, however long the prefix is.
        """
        if (T, R) not in self._masks:
            B, A = self.seen.shape
            if self.window is not None and not self.ring:  # a block sees only a small part of a long prefix
                self._masks[T, R] = [chunk for b in range(B) for chunk in self._windows(b, T, R)]
            else:
                count = max(1, _MASK_ENTRIES // (B * R * T)) if T else A
                groups = [slice(start, min(start + count, A)) for start in range(0, A, count)]
                ends = [T if self.ring else int(self.bounds[1, :, group].max().clip(0, T)) for group in groups]
                self._masks[T, R] = [
                    (slice(0, B), group, slice(0, end)) for group, end in zip(groups, ends, strict=True)
                ]
        chunks: list[tuple[slice, slice, slice]] = self._masks[T, R]
        return chunks

    def _windows(self, row: int, T: int, R: int) -> Iterator[tuple[slice, slice, slice]]:
        """Yield chunks of the blocks of one row: its windows move independently of other rows'."""
        assert self.window is not None
        begin, low, high = 0, T, 0
        bounds = self.bounds[:, row].clip(max=T).T.tolist()
        for block, (first, end) in enumerate(bounds):
            together = max(high, end) - min(low, first)
            count = block + 1 - begin
            if block > begin and (together > 2 * self.window or count * R * together > _MASK_ENTRIES):
                yield slice(row, row + 1), slice(begin, block), slice(low, max(low, high))
                begin, low, high = block, T, 0
            low, high = min(low, first), max(high, end)
        yield slice(row, row + 1), slice(begin, len(bounds)), slice(low, max(low, high))


def block_attention(
    queries: torch.Tensor, prefix: KeysValues, own: KeysValues, context_mask: ContextMask
) -> torch.Tensor:
    """Return softmax attention [B, A, S, heads · D] of A blocks per row, with the scale 1 / √D, in the values' dtype.

    queries: [B, heads, A, S, D]; query heads that read one key head are neighbours, as in transformers.
    prefix: keys and values [B, kv_heads, T, D]; own: keys and values [B, kv_heads, A, J, D].
    """
    dtype = own[1].dtype
    keys, values, own_keys, own_values = (x.to(dtype) for x in (*prefix, *own))
    B, heads, A, S, D = queries.shape
    kv_heads = keys.shape[1]
    on_cpu = queries.device.type == "cpu"
    if not on_cpu and A > 1:
        return _with_flex(queries.to(dtype), (keys, values), (own_keys, own_values), context_mask)
    # the query heads of a key head become more queries of it: keys and values are read in place, not repeated
    q = queries.to(dtype).view(B, kv_heads, heads // kv_heads, A, S, D).transpose(2, 3).flatten(3, 4).contiguous()
    if not on_cpu:
        out = _one_block(q, (keys, values), (own_keys, own_values), context_mask, S)
    else:
        out = _Merged.apply(q, keys, values, own_keys, own_values, context_mask, S)
    return out.unflatten(3, (-1, S)).permute(0, 2, 4, 1, 3, 5).flatten(3)


class _Merged(torch.autograd.Function):
    """Attention over prefix and block, merged. Returns a tensor like q.

    q: [B, kv_heads, A, R, D] with R = query heads of a key head · S; others as in `block_attention`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        own_keys: torch.Tensor,
        own_values: torch.Tensor,
        context_mask: ContextMask,
        S: int,
    ) -> torch.Tensor:
        own = _mask(context_mask.own(S, own_keys.shape[3]), q)
        # blocks and key heads are independent sequences of the kernel
        out, total = _forward(*(x.flatten(0, 1) for x in (q, own_keys, own_values)), attn_mask=own)
        out, total = out.view(q.shape), total.view(q.shape[:4])  # [B, kv_heads, A, R] float32
        for rows, group, entries in context_mask.chunks(keys.shape[2], q.shape[3]):
            if entries.start >= entries.stop:
                continue
            chunk, mask = q[rows, :, group], _mask(context_mask.visible(entries, S, rows, group), q)
            read = _forward(chunk.flatten(2, 3), keys[rows, :, entries], values[rows, :, entries], attn_mask=mask)
            from_prefix, seen = read[0].reshape(chunk.shape), read[1].reshape(chunk.shape[:4])
            both = torch.logaddexp(total[rows, :, group], seen)
            share = (seen - both).exp()[..., None]  # the prefix's share of the whole softmax
            out[rows, :, group] = torch.lerp(out[rows, :, group].to(share.dtype), from_prefix.to(share.dtype), share)
            total[rows, :, group] = both
        ctx.save_for_backward(q, keys, values, own_keys, own_values, out, total)
        ctx.context_mask, ctx.S = context_mask, S
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        q, keys, values, own_keys, own_values, out, total = ctx.saved_tensors
        context_mask, S, grad = ctx.context_mask, ctx.S, grad_outputs[0]
        q_grad, own_keys_grad, own_values_grad = (torch.empty_like(x) for x in (q, own_keys, own_values))
        keys_grad, values_grad = (torch.zeros(x.shape, dtype=total.dtype, device=x.device) for x in (keys, values))
        own_sees = _each_query(context_mask.own(S, own_keys.shape[3]), q)
        for rows, group, entries in context_mask.chunks(keys.shape[2], q.shape[3]):
            whole = [x[rows, :, group] for x in (grad, q, out, total)]
            own_group = own_keys[rows, :, group], own_values[rows, :, group]
            own = _own_backward(own_group, own_sees, *whole)
            q_grad[rows, :, group], own_keys_grad[rows, :, group], own_values_grad[rows, :, group] = own
            if entries.start < entries.stop:
                flat_grad, flat_q, flat_out, flat_total = (x.flatten(2, 3) for x in whole)
                read = (keys[rows, :, entries], values[rows, :, entries])
                mask = _mask(context_mask.visible(entries, S, rows, group), q)
                dq, dk, dv = _backward(flat_grad, flat_q, *read, flat_out, flat_total, 0.0, False, attn_mask=mask)
                q_grad[rows, :, group] += dq.reshape(whole[1].shape)
                keys_grad[rows, :, entries] += dk
                values_grad[rows, :, entries] += dv
        prefix_grads = keys_grad.to(keys.dtype), values_grad.to(values.dtype)
        return q_grad, *prefix_grads, own_keys_grad, own_values_grad, None, None


def _own_backward(
    own: KeysValues,
    sees: torch.Tensor | None,
    grad: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a block's own keys' share of the gradients of q, keys and values. The kernel is slow for few keys."""
    grad, q, out, keys, values = (x.to(total.dtype) for x in (grad, q, out, *own))
    scale = 1 / math.sqrt(q.shape[-1])
    weights = (scale * (q @ keys.mT) - total[..., None]).exp()  # [B, kv_heads, A, R, J]
    if sees is not None:
        weights = weights.masked_fill(~sees, 0.0)
    score_grad = scale * weights * (grad @ values.mT - (grad * out).sum(-1, keepdim=True))
    return score_grad @ keys, score_grad.mT @ q, weights.mT @ grad


def _each_query(sees: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """Repeat […, S or 1, keys] to […, R, keys], for the queries of all heads that read one key head."""
    return None if sees is None else sees.repeat(*[1] * (sees.dim() - 2), q.shape[3] // sees.shape[-2], 1)


def _mask(sees: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """Return the mask to add to the scores [B, 1, A · R, keys], for bool [S, J] or [B, A, S or 1, entries]."""
    repeated = _each_query(sees, q)
    if repeated is None:
        return None
    hidden = max(_HIDDEN, torch.finfo(q.dtype).min)  # float16 ends at -65504, which is far enough from any score
    added = torch.zeros(repeated.shape, dtype=q.dtype, device=q.device).masked_fill_(~repeated, hidden)
    return added[None, None] if added.dim() == 2 else added.flatten(1, 2)[:, None]


def _one_block(q: torch.Tensor, prefix: KeysValues, own: KeysValues, context_mask: ContextMask, S: int) -> torch.Tensor:
    """Attend for A = 1: prefix and block are one sequence, and there are no other blocks to skip."""
    T, J = prefix[0].shape[2], own[0].shape[3]
    keys, values = (torch.cat([before, block[:, :, 0]], 2) for before, block in zip(prefix, own, strict=True))
    sees_prefix, sees_block = context_mask.sees(slice(0, T), S)[:, 0], context_mask.own(S, J)
    own_sees = torch.ones(1, 1, device=q.device, dtype=torch.bool) if sees_block is None else sees_block
    mask = torch.cat([sees_prefix.expand(-1, S, -1), own_sees.expand(len(q), S, J)], -1)
    return F.scaled_dot_product_attention(
        q[:, :, 0], keys, values, attn_mask=mask.repeat(1, q.shape[3] // S, 1)[:, None]
    )[:, :, None]


def _with_flex(q: torch.Tensor, prefix: KeysValues, own: KeysValues, context_mask: ContextMask) -> torch.Tensor:
    assert not context_mask.ring, "requests in flight have one block each"
    _, _, _, S, D = q.shape
    T, J = prefix[0].shape[2], own[0].shape[3]
    keys, values = (torch.cat([before, blocks.flatten(2, 3)], 2) for before, blocks in zip(prefix, own, strict=True))
    attend, _ = _flex()
    out = attend(
        q.flatten(2, 3),
        keys,
        values,
        block_mask=context_mask.block_mask(T, S, J),
        scale=1 / math.sqrt(D),
        enable_gqa=True,
        kernel_options=_KERNEL,
    )
    return out.transpose(1, 2).flatten(2).unflatten(1, (-1, S))


# For fewer than 128 queries flex attention would use a second kernel, flex decoding. It is not worth compiling for the
# last few blocks of an answer: in float32 that takes two minutes.
_KERNEL = {"BACKEND": "TRITON"}


@cache
def _flex(eager: bool = False) -> tuple[Any, Any]:
    """Return flex attention, and the function that creates its mask."""
    # imported here: it loads torch's compiler, which only CUDA needs
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if eager:
        return flex_attention, create_block_mask
    return compiled(flex_attention), compiled(create_block_mask)
