"""Dense reference of block attention: every query against the prefix and the keys of all blocks, with a mask."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from draftsmith.stages.drafters.block_attention import ContextMask, KeysValues


def dense_attention(queries: torch.Tensor, prefix: KeysValues, own: KeysValues, reach: ContextMask) -> torch.Tensor:
    """Compute what `block_attention` computes."""
    _, heads, A, S, _ = queries.shape
    keys, values = (torch.cat([p, o.flatten(2, 3)], 2) for p, o in zip(prefix, own, strict=True))
    mask = block_mask(reach, prefix[0].shape[2], S, own[0].shape[3])
    out = F.scaled_dot_product_attention(
        queries.flatten(2, 3).to(values.dtype),
        keys.to(values.dtype),
        values,
        attn_mask=mask[:, None],
        enable_gqa=heads != keys.shape[1],
    )
    return out.transpose(1, 2).flatten(2).unflatten(1, (A, S))


def block_mask(reach: ContextMask, T: int, S: int, J: int) -> torch.Tensor:
    """Return bool [B, A · S, T + A · J]: the visible entries of the prefix, and the block's own keys."""
    B, A = reach.seen.shape
    seen = reach.seen[:, :, None, None]
    query, entry, own = torch.arange(S)[:, None], torch.arange(T), torch.arange(J)
    window = T + S + J if reach.window is None else reach.window
    of_prefix = (entry < seen) & (entry > seen + query - window)
    if reach.first is not None:
        of_prefix = of_prefix & (entry >= reach.first[:, :, None, None])
    of_own = (own > query - window) & ((own <= query) | torch.tensor(not reach.causal))
    blocks = torch.block_diag(*[of_own.int()] * A).bool()
    return torch.cat([of_prefix.flatten(1, 2), blocks.expand(B, -1, -1)], -1)
