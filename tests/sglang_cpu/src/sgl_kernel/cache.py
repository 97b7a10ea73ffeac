"""Bookkeeping of the key/value pool: which slot holds which token of a request. The originals are loops in C++.

`req_to_token` [rows, L] maps a request's row and a token's position to a slot of the pool. `pool_len` (its width) is
part of the originals' signatures and needed only where strides are computed by hand.
"""

from __future__ import annotations

import ctypes

import torch


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy slots `src_loc` to `tgt_loc` in every buffer: data_ptrs [buffers] addresses, strides [buffers] bytes a slot.

    All sources are read before the first target is written, as they may overlap.
    """
    sources, targets = src_loc.tolist(), tgt_loc.tolist()
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(address + slot * stride, stride) for slot in sources]
        for slot, row in zip(targets, rows, strict=True):
            ctypes.memmove(address + slot * stride, row, stride)


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,  # noqa: ARG001
) -> None:
    """Hand the slots `out_cache_loc`, in order, to positions start … end-1 of each request. Writes `req_to_token`."""
    done = 0
    for row, start, end in _spans(req_pool_indices, start_offset, end_offset):
        req_to_token[row, start:end] = out_cache_loc[done : done + end - start].to(req_to_token.dtype)
        done += end - start


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,  # noqa: ARG001
) -> None:
    """The other direction: the slots of positions start … end-1 of each request. Writes `out_cache_loc`."""
    done = 0
    for row, start, end in _spans(req_pool_indices, start_offset, end_offset):
        out_cache_loc[done : done + end - start] = req_to_token[row, start:end].to(out_cache_loc.dtype)
        done += end - start


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    num_steps: int,
) -> None:
    """Write the slots of the topk * num_steps positions after each request's tokens to `out_cache_loc`."""
    assign_extend_cache_locs_cpu(
        req_pool_indices, req_to_token, seq_lens, seq_lens + topk * num_steps, out_cache_loc, pool_len
    )


def build_draft_decode_metadata_cpu(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,  # noqa: ARG001  (where a tree's branches part)
    topk: int,
    num_steps: int,  # noqa: ARG001
    pool_len: int,  # noqa: ARG001
) -> torch.Tensor:
    """The rows of `req_to_token` that the drafter decodes with, one a request: a chain's slots follow the prefix's."""
    if topk != 1:
        raise NotImplementedError(f"the CPU stand-in of sgl_kernel drafts chains only, not top-k {topk}")
    return req_to_token[req_pool_indices.long()].contiguous()


def _spans(rows: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor) -> zip[tuple[int, int, int]]:
    return zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)
