"""Bookkeeping of EAGLE3's verification, for chains (top-k 1). The originals are loops in C++ over trees.

Shapes: R requests, n verified tokens a request (the last committed one and n-1 drafts). DFLASH verifies in torch and
calls none of these.
"""

from __future__ import annotations

import torch


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor,  # noqa: ARG001  (not needed for a chain)
    selected_index: torch.Tensor,  # noqa: ARG001
    verified_seq_len: torch.Tensor,
    tree_mask: torch.Tensor,  # noqa: ARG001  (the attention backend masks a chain as causal and ignores it)
    positions: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,  # noqa: ARG001
) -> None:
    """The tree of a chain: token i follows i-1, nobody has a sibling.

    verified_seq_len: [R]; writes positions [R*n] and, all [R, n], where a token lies in the flat batch, its first child
    and its next sibling (-1: none).
    """
    n = draft_token_num
    if topk != 1 or n != depth + 1:
        raise NotImplementedError(
            f"the CPU stand-in of sgl_kernel verifies whole chains only, not top-k {topk} with {n} of {depth} steps"
        )
    requests, offsets = len(verified_seq_len), torch.arange(n)
    positions.copy_((verified_seq_len[:, None] + offsets).flatten())
    retrive_index.copy_(torch.arange(requests * n).view(requests, n))
    retrive_next_token.copy_(torch.where(offsets < n - 1, offsets + 1, -1).expand(requests, n))
    retrive_next_sibling.fill_(-1)


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,  # noqa: ARG001  (not needed for a chain)
    retrive_next_sibling: torch.Tensor,  # noqa: ARG001
    target_predict: torch.Tensor,
) -> None:
    """Accept the drafts that equal the target's argmax, up to the first that does not.

    candidates, target_predict: [R, n]. Writes accept_token_num [R] (drafts accepted), accept_index [R, steps] (indices
    in the flat batch; after the last accepted one unchanged, -1) and, at these indices of predicts [R*n], the target's
    token.
    """
    target = target_predict.view_as(candidates)
    accepted = (candidates[:, 1:] == target[:, :-1]).long().cumprod(1).sum(1).clamp(max=accept_index.shape[1] - 1)
    accept_token_num.copy_(accepted)
    for request, count in enumerate(accepted.tolist()):
        indices = retrive_index[request, : count + 1]
        accept_index[request, : count + 1] = indices.to(accept_index.dtype)
        predicts[indices.long()] = target[request, : count + 1].to(predicts.dtype)


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor, accept_lens: torch.Tensor, bonus_tokens: torch.Tensor, accept_stride: int
) -> None:
    """The last committed token of each request: accept_tokens [R * accept_stride], accept_lens [R] tokens committed."""
    last = torch.arange(len(accept_lens)) * accept_stride + accept_lens.long() - 1
    bonus_tokens[: len(last)] = accept_tokens.flatten()[last].to(bonus_tokens.dtype)


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Write the slots of accepted tokens to the front of `accept_out_cache_loc`. accept_index: -1 = not accepted."""
    accepted = accept_index.flatten().long()
    slots = out_cache_loc[accepted[accepted >= 0]]
    accept_out_cache_loc[: len(slots)] = slots.to(accept_out_cache_loc.dtype)


def rotate_input_ids_cpu(*_args: object) -> None:
    """Refuse drafters with several layers, for which SGLang imports this function together with the others."""
    raise NotImplementedError("the CPU stand-in of sgl_kernel does not serve multi-layer EAGLE")
