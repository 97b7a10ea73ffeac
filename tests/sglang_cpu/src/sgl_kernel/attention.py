"""Attention of SGLang's backend `intel_amx`, by torch's scaled dot product. The originals are AMX kernels in C++.

Shapes: N new tokens in the batch, R requests, S slots of the pool, L entries that a request holds; Hq heads of queries,
Hkv of keys and values, D their width. `req_to_token` [rows, L] has the pool slot of each token of a request.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """q [n, Hq, D], k and v [L, Hkv, D], visible bool [n, L] or None for all → [n, Hq, D]."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k.to(q.dtype), v.to(q.dtype)))
    return scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def _refuse(**features: object) -> None:
    """Refuse features of the original that are not covered."""
    unsupported = [name for name, value in features.items() if value]
    if unsupported:
        raise NotImplementedError(f"the CPU stand-in of sgl_kernel has no attention with {', '.join(unsupported)}")


def decode_attention_cpu(
    query: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    k_scale: float,
    v_scale: float,
    output: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    loc: torch.Tensor,
    attn_logits: torch.Tensor,  # noqa: ARG001  (scratch memory of the kernel)
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window_size: int,
    encoder_lens: torch.Tensor | None,  # noqa: ARG001  (of cross-attention)
    sinks: torch.Tensor | None,
) -> None:
    """One new token a request: store its key and value, then attend to all entries of the request, itself included.

    query, output: [R, Hq, D]; k_buffer, v_buffer: [S, Hkv, D]; loc: [R] slots of the new tokens. Writes `output`.
    """
    _refuse(
        logit_cap=logit_cap,
        cross_attention=is_cross_attn,
        sliding_window=sliding_window_size > 0,
        sinks=sinks is not None,
        scales=(k_scale, v_scale) != (1.0, 1.0),
    )
    if key is not None and value is not None:
        k_buffer[loc] = key.view(-1, *k_buffer.shape[1:]).to(k_buffer.dtype)
        v_buffer[loc] = value.view(-1, *v_buffer.shape[1:]).to(v_buffer.dtype)
    for i, (row, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        slots = req_to_token[row, :length].long()
        output[i : i + 1] = _attend(query[i : i + 1], k_buffer[slots], v_buffer[slots], None, sm_scale)


def extend_attention_cpu(
    q_extend: torch.Tensor,
    k_extend: torch.Tensor | None,  # noqa: ARG001  (the backend has stored them in the pool already)
    v_extend: torch.Tensor | None,  # noqa: ARG001
    o_extend: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    k_scale: float,
    v_scale: float,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    extend_start_loc: torch.Tensor,
    max_len_extend: int,  # noqa: ARG001  (scratch memory of the kernel)
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window_size: int,
    encoder_lens: torch.Tensor | None,  # noqa: ARG001  (of cross-attention)
    sinks: torch.Tensor | None,
    tree_mask: torch.Tensor | None,
    is_causal: bool,
) -> None:
    """Attend with several new tokens a request (prefill, verification, a drafter's block) after those in the pool.

    q_extend, o_extend: [N, Hq, D]; seq_lens, extend_seq_lens, extend_start_loc: [R], entries with the new ones, new
    ones, and where these begin in N. Causal, or (a DFlash block) every new token sees all. sliding_window_size: so many
    positions are all that a token sees, its own included; 0: no bound. Writes `o_extend`.
    """
    _refuse(
        logit_cap=logit_cap,
        cross_attention=is_cross_attn,
        sinks=sinks is not None,
        tree_mask=tree_mask is not None,
        scales=(k_scale, v_scale) != (1.0, 1.0),
    )
    requests = (t.tolist() for t in (req_pool_indices, seq_lens, extend_seq_lens, extend_start_loc))
    for row, length, new, start in zip(*requests, strict=True):
        slots = req_to_token[row, :length].long()
        position = torch.arange(length)
        query = position[length - new :, None]
        visible = position <= query if is_causal else None
        if sliding_window_size > 0:
            near = position > query - sliding_window_size
            visible = near if visible is None else visible & near
        rows = slice(start, start + new)
        o_extend[rows] = _attend(q_extend[rows], k_buffer[slots], v_buffer[slots], visible, sm_scale)
