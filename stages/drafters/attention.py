"""Attention of blocks: each over the part of a shared prefix that it may see, and over itself, never over another.

The mask over prefix and all blocks, which says the same, has (A · S) · (T + A · J) entries, nearly all of them false
for the blocks of others. On CUDA flex attention (arXiv 2412.05496) skips what is false. Elsewhere the two parts are
computed as what they are, each by the fused kernel, and merged by their log-sum-exp; the kernel's backward takes the
gradient of a part from the output and the log-sum-exp of the whole, as ring attention does (arXiv 2310.01889). Either
way work is linear in the number of blocks, and kept for backward are inputs, output and a log-sum-exp: no scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch.nn import functional as F

KeysValues = tuple[torch.Tensor, torch.Tensor]

_HIDDEN = -1e9  # added to a score that is not to count; finite, so that a part without anything visible is no NaN
# Of the prefix part's mask at once: blocks are read in groups, and a group reads no further than its last block sees.
_MASK_ENTRIES = 2**22

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Reach:
    """How far the blocks of a batch read: block a of row b entries first[b, a] … seen[b, a] - 1 of its row's prefix."""

    seen: torch.Tensor  # [B, A] integers
    first: torch.Tensor | None = None  # [B, A]; None: from the beginning
    _masks: dict[tuple[int, int, int], Any] = field(default_factory=dict)

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Of block a in all rows: the least and the most that it sees."""
        return list(zip(self.seen.amin(0).tolist(), self.seen.amax(0).tolist(), strict=True))

    def visible(self, length: int, group: slice = slice(None)) -> torch.Tensor:
        """bool [B, A, length]: which of the first entries each block of a group sees."""
        entries = torch.arange(length, device=self.seen.device)
        sees = entries < self.seen[:, group, None]
        return sees if self.first is None else sees & (entries >= self.first[:, group, None])

    def block_mask(self, T: int, S: int, J: int) -> Any:
        """Flex attention's, of A · S queries over T entries of a prefix and A · J of blocks; the same in all layers."""
        if (T, S, J) not in self._masks:
            B, A = self.seen.shape
            # tensors: a number would be compiled in, and every length compiled anew
            prefix, queries, own = (torch.tensor(n, device=self.seen.device) for n in (T, S, J))
            seen, first = self.seen, torch.zeros_like(self.seen) if self.first is None else self.first

            def sees(b: torch.Tensor, _h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
                block = q // queries
                of_prefix = (k < seen[b, block]) & (k >= first[b, block])
                return torch.where(k < prefix, of_prefix, (k - prefix) // own == block)

            self._masks[T, S, J] = _flex().mask(sees, B, None, A * S, T + A * J, self.seen.device)
        return self._masks[T, S, J]


def block_attention(queries: torch.Tensor, prefix: KeysValues, own: KeysValues, reach: Reach) -> torch.Tensor:
    """Softmax attention of A blocks a row, with the scale 1 / √D.

    queries: [B, heads, A, S, D]; prefix: keys and values [B, kv_heads, T, D]; own: keys and values
    [B, kv_heads, A, J, D], all of which each of the block's S queries sees. Query heads that read one key head are
    neighbours, as in transformers. Returns [B, A, S, heads · D] in the values' dtype.
    """
    dtype = own[1].dtype
    keys, values, own_keys, own_values = (x.to(dtype) for x in (*prefix, *own))
    B, heads, A, S, D = queries.shape
    kv_heads = keys.shape[1]
    if queries.is_cuda and A > 1:
        return _with_flex(queries.to(dtype), (keys, values), (own_keys, own_values), reach)
    # the query heads of a key head as further queries of it: keys and values are read in place, not repeated
    q = queries.to(dtype).view(B, kv_heads, heads // kv_heads, A, S, D).transpose(2, 3).flatten(3, 4).contiguous()
    if queries.is_cuda:
        out = _one_block(q, (keys, values), (own_keys, own_values), reach)
    else:
        out = _Merged.apply(q, keys, values, own_keys, own_values, reach)
    return out.unflatten(3, (-1, S)).permute(0, 2, 4, 1, 3, 5).flatten(3)


class _Merged(torch.autograd.Function):
    """q: [B, kv_heads, A, R, D] with R = query heads of a key head · S; others as in `block_attention`. Like q."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        own_keys: torch.Tensor,
        own_values: torch.Tensor,
        reach: Reach,
    ) -> torch.Tensor:
        out, total = _forward(*(_blocks(x) for x in (q, own_keys, own_values)))
        out, total = out.view(q.shape), total.view(q.shape[:4])  # [B, kv_heads, A, R] float32
        for group, length, mask in _groups(reach, q, keys.shape[2]):
            if not length:
                continue
            read = _forward(q[:, :, group].flatten(2, 3), keys[:, :, :length], values[:, :, :length], attn_mask=mask)
            of_group = q[:, :, group].shape
            from_prefix, seen = read[0].reshape(of_group), read[1].reshape(of_group[:4])
            both = torch.logaddexp(total[:, :, group], seen)
            share = (seen - both).exp()[..., None]  # of the prefix in the softmax of the whole
            out[:, :, group] = torch.lerp(out[:, :, group].to(share.dtype), from_prefix.to(share.dtype), share)
            total[:, :, group] = both
        ctx.save_for_backward(q, keys, values, own_keys, own_values, out, total)
        ctx.reach = reach
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        q, keys, values, own_keys, own_values, out, total = ctx.saved_tensors
        grad = grad_outputs[0]
        of_q, of_own_keys, of_own_values = (torch.empty_like(x) for x in (q, own_keys, own_values))
        of_keys, of_values = (torch.zeros(x.shape, dtype=total.dtype, device=x.device) for x in (keys, values))
        for group, length, mask in _groups(ctx.reach, q, keys.shape[2]):
            whole = [x[:, :, group] for x in (grad, q, out, total)]
            own = _own_backward(own_keys[:, :, group], own_values[:, :, group], *whole)
            of_q[:, :, group], of_own_keys[:, :, group], of_own_values[:, :, group] = own
            if length:
                grad_of, q_of, out_of, total_of = (x.flatten(2, 3) for x in whole)
                read = (keys[:, :, :length], values[:, :, :length])
                dq, dk, dv = _backward(grad_of, q_of, *read, out_of, total_of, 0.0, False, attn_mask=mask)
                of_q[:, :, group] += dq.reshape(q[:, :, group].shape)
                of_keys[:, :, :length] += dk
                of_values[:, :, :length] += dv
        return of_q, of_keys.to(keys.dtype), of_values.to(values.dtype), of_own_keys, of_own_values, None


def _own_backward(
    keys: torch.Tensor,
    values: torch.Tensor,
    grad: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the blocks' own part adds to the gradients of q, keys and values: few keys, for which the kernel is slow."""
    grad, q, out, keys, values = (x.to(total.dtype) for x in (grad, q, out, keys, values))
    scale = 1 / math.sqrt(q.shape[-1])
    weights = (scale * (q @ keys.mT) - total[..., None]).exp()  # [B, kv_heads, A, R, J]
    of_scores = scale * weights * (grad @ values.mT - (grad * out).sum(-1, keepdim=True))
    return of_scores @ keys, of_scores.mT @ q, weights.mT @ grad


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """[B, kv_heads, A, …] as the kernel takes independent sequences: [B · kv_heads, A, …]."""
    return x.flatten(0, 1)


def _groups(reach: Reach, q: torch.Tensor, T: int) -> Iterator[tuple[slice, int, torch.Tensor | None]]:
    """Neighbouring blocks, how far any of them reads, and what is added to their scores [B, 1, blocks · R, length]."""
    B, _, A, R, _ = q.shape
    count = max(1, _MASK_ENTRIES // (B * R * T)) if T else A
    for start in range(0, A, count):
        group = slice(start, min(start + count, A))
        bounds = reach.bounds[group]
        least, length = min(low for low, _ in bounds), max(0, min(T, max(high for _, high in bounds)))
        mask = None
        if least < length or reach.first is not None:
            visible = reach.visible(length, group)
            mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, _HIDDEN)
            mask = mask.repeat_interleave(R, 1)[:, None]
        yield group, length, mask


def _one_block(q: torch.Tensor, prefix: KeysValues, own: KeysValues, reach: Reach) -> torch.Tensor:
    """A = 1: prefix and block are one sequence, and no other block is read in vain."""
    keys, values = (torch.cat([of_prefix, of_own[:, :, 0]], 2) for of_prefix, of_own in zip(prefix, own, strict=True))
    seen = reach.visible(prefix[0].shape[2])
    mask = F.pad(seen, (0, own[0].shape[3]), value=True)[:, None]
    return F.scaled_dot_product_attention(q[:, :, 0], keys, values, attn_mask=mask)[:, :, None]


def _with_flex(q: torch.Tensor, prefix: KeysValues, own: KeysValues, reach: Reach) -> torch.Tensor:
    _, _, _, S, D = q.shape
    T, J = prefix[0].shape[2], own[0].shape[3]
    keys, values = (
        torch.cat([of_prefix, of_own.flatten(2, 3)], 2) for of_prefix, of_own in zip(prefix, own, strict=True)
    )
    out = _flex().attention(
        q.flatten(2, 3), keys, values, block_mask=reach.block_mask(T, S, J), scale=1 / math.sqrt(D), enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2).unflatten(1, (-1, S))


@dataclass(frozen=True)
class _Flex:
    attention: Any
    mask: Any


@cache
def _flex(compiled: bool = True) -> _Flex:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not compiled:
        return _Flex(flex_attention, create_block_mask)
    return _Flex(torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True))
