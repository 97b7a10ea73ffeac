"""Grouped-query attention over a cache, with the query heads of a group folded into the query positions.

Keys and values are read in place, without a copy for every query head; on a CPU in bfloat16 this is several times
faster than the masked kernels with repeated keys or with their own grouping. Soft-capped scores and sinks (an extra
score of each head that takes probability and adds nothing) have no fused kernel, and are computed from explicit scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "draftsmith_grouped"
_SCORES = 2**24  # scores in memory at a time: queries are processed in chunks
_MASK_ENTRIES = 2**31  # limit of one call: a kernel of torch counts them in 32 bits (pytorch/pytorch#187227)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return attention [n, T, heads, D], and None for its weights. The signature is transformers'.

    query: [n, heads, T, D]; key, value: [n, kv_heads, L, D]; attention_mask: additive or bool [n, 1, T, L], None or
    `causal_mask`: causal. softcap: scores are softcap · tanh(score / softcap). s_aux: [heads] sinks.
    """
    if attention_mask is not None and is_causal(attention_mask):
        attention_mask = None
    if softcap is not None or s_aux is not None:
        return scored_attention(query, key, value, attention_mask, scaling, softcap, s_aux), None
    if attention_mask is None or query.shape[1] == key.shape[1] or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    mask = fold(attention_mask, query.shape[1] // key.shape[1])
    return folded_attention(query, key, value, mask, scaling).contiguous(), None  # some models view it


def causal_mask(device: torch.device) -> torch.Tensor:
    """Return a mask without entries, which stands for causal attention over only the tokens of a forward.

    Kernels that need no mask skip half of the scores. Decoders of transformers pass on any mask of four dimensions
    unchanged, but make their own from None.
    """
    return torch.empty(1, 1, 0, 0, device=device)


def is_causal(mask: torch.Tensor) -> bool:
    """Return whether a mask is `causal_mask`."""
    return mask.shape[-1] == 0


def fold(mask: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat a mask [n, 1, T, L] for `folded_attention`; a single row of queries broadcasts over its group."""
    return mask if mask.shape[2] <= 1 or groups == 1 else mask.repeat(1, 1, groups, 1)


def folded_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Return attention [n, T, heads, D] without soft cap and sinks. mask: folded, or `causal_mask`."""
    n, heads, T, D = query.shape
    if is_causal(mask):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)
    if T == 1 and query.dtype == torch.bfloat16 and query.device.type == "cpu" and _multiplies_tiles():
        # One query per head: the kernel's own grouping is up to 1.6 times as fast in one thread on a processor with
        # AMX, gains nothing from more threads, and takes six times as long without AMX.
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)
    queries = query.reshape(n, key.shape[1], heads // key.shape[1] * T, D)
    rows = max(1, _MASK_ENTRIES // (n * mask.shape[-1]))
    if mask.shape[2] <= rows:
        out = F.scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scaling)
    else:
        chunks = zip(queries.split(rows, 2), mask.split(rows, 2), strict=True)
        out = torch.cat(
            [F.scaled_dot_product_attention(q, key, value, attn_mask=m, scale=scaling) for q, m in chunks], 2
        )
    return out.reshape(n, heads, T, out.shape[-1]).transpose(1, 2)


def _multiplies_tiles() -> bool:
    """Return whether one thread computes, on a processor with AMX."""
    return torch.get_num_threads() == 1 and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def scored_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return attention [n, T, heads, D] from explicit scores, chunk by chunk, with the softmax in float32."""
    n, heads, T, D = query.shape
    kv_heads, L = key.shape[1:3]
    if mask is None:
        entries = torch.arange(L, device=query.device)
        mask = (entries <= entries[-T:, None])[None, None]
    grouped = query.view(n, kv_heads, heads // kv_heads, T, D)
    chunks = []
    for part, seen in zip(*(x.split(max(1, _SCORES // (n * heads * L)), -2) for x in (grouped, mask)), strict=True):
        scores = (part.flatten(2, 3) @ key.transpose(2, 3)).unflatten(2, part.shape[2:4]).float()
        scores *= D**-0.5 if scaling is None else scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if seen.dtype == torch.bool:
            scores = scores.masked_fill(~seen[:, :, None], torch.finfo(scores.dtype).min)
        else:
            scores += seen[:, :, None]
        if sinks is not None:
            sink = sinks.float().view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1)[..., :L].to(value.dtype)
        chunks.append((weights.flatten(2, 3) @ value).unflatten(2, part.shape[2:4]))
    return torch.cat(chunks, 3).flatten(1, 2).transpose(1, 2).contiguous()


def register() -> str:
    """Register `grouped_attention` with transformers; return its name for `attn_implementation`."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
