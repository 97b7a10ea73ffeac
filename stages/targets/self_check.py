"""Compares a target's cached forwards and logits with the model's own on a dozen tokens, whenever one is loaded.

A config states the kinds of layers, and tests compare known families. This finds any other model that ignores masks,
keeps a state elsewhere, or changes its logits in a way that its config does not state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.ranks import ALONE, Ranks

_TOKENS, _PREFIX, _COMMITTED = 12, 7, 2  # tokens of the text, of its prefix, and committed of the block after it
# Relative difference of vectors, median over positions: a coarse dtype may route a near-tie to other experts.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@torch.no_grad()
def check_agreement(target: Any, where: str, ranks: Ranks = ALONE) -> None:
    """Check a `Target`. Raises DraftsmithError if logits, cached forwards or a tree differ from a plain forward, if
    layers do not output one vector per token, or if the ranks that share the target disagree."""
    device, vocabulary = target.device, target.embedding.shape[0]
    ids = (torch.arange(_TOKENS, device=device) * 7 + 3).remainder(vocabulary)[None]
    read = target.read(ids, (0,))
    plain = read.hidden
    if read.features is None or read.features.shape != plain.shape:
        raise DraftsmithError(
            f"target {where}: layers of {target.info.architecture} do not output one vector per token, which a "
            "drafter reads. Choose another target."
        )
    logits = target.logit_map(
        F.linear(plain, target.head_weight).float()
    )  # `Target.logits` would pack the head, which training does not use
    model_logits = target.model(input_ids=ids, use_cache=False).logits.float()
    if model_logits.isnan().any():
        raise DraftsmithError(
            f"target {where}: its logits are NaN in {str(target.dtype).removeprefix('torch.')}. Copy or download the "
            "model again if its weights are damaged, or set target.dtype if they are too large for float16."
        )
    pairs = {
        "logits": (logits, model_logits),
        "cached forwards": (_cached_forwards(target, ids, _COMMITTED), plain[:, _PREFIX:]),
    }
    if target.layers.recurrent:  # some layers have another code path for one token
        pairs["cached forwards of one token"] = (_cached_forwards(target, ids, 1), plain[:, _PREFIX:])
    else:
        pairs["forwards over a tree"] = _tree_forward(target, ids, plain)
    if ranks.target_parallel > 1:
        pairs["hidden states of a slice"] = (plain.cpu(), ranks.gather_in_target_group(plain.cpu())[0])
    for what, (ours, theirs) in pairs.items():
        difference = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median()
        if not difference <= _TOLERANCE[target.dtype]:  # NaN too
            raise DraftsmithError(
                f"target {where}: {what} differ from the model's own by {float(difference):.2g} (relative): "
                f"{target.info.architecture} computes something that is not supported. Choose another target."
            )


def _cached_forwards(target: Any, ids: torch.Tensor, committed: int) -> torch.Tensor:
    """Return hidden states after the prefix: of a block whose first `committed` tokens are committed, and of the rest.

    If one token is committed, a block of one token is read first and rejected.
    """
    cache = target.new_cache(1, _TOKENS)
    positions = torch.arange(_TOKENS, device=ids.device)[None]

    def step(begin: int, end: int, advance: bool = True) -> torch.Tensor:
        at = slice(begin, end)
        out = target.step(ids[:, at], positions[:, at], cache, slice(0, 1), length=end, advance=advance)
        hidden: torch.Tensor = out.hidden
        return hidden

    step(0, _PREFIX)
    if committed == 1:
        step(_PREFIX, _PREFIX + 1, advance=False)
    first = step(_PREFIX, _TOKENS, advance=False)
    target.commit(ids[:, _PREFIX:], [_PREFIX], cache, 0, [committed])
    return torch.cat([first[:, :committed], step(_PREFIX + committed, _TOKENS)], 1)


def _tree_forward(target: Any, ids: torch.Tensor, plain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states of the text's end and of another continuation: by one forward, and by two."""
    device, length = ids.device, _TOKENS - _PREFIX
    other = ids.flip(1)[:, :length]  # after _COMMITTED tokens of the text
    cache = target.new_cache(1, _PREFIX + 2 * length)
    target.step(ids[:, :_PREFIX], torch.arange(_PREFIX, device=device)[None], cache, slice(0, 1))
    order = torch.arange(length, device=device)
    causal = order[:, None] >= order
    visible = torch.block_diag(causal, causal)
    prefix = (
        torch.arange(_PREFIX, device=device)
        < torch.tensor([_PREFIX, _COMMITTED], device=device).repeat_interleave(length)[:, None]
    )
    tree = target.step(
        torch.cat([ids[:, _PREFIX:], other], 1),
        torch.cat([_PREFIX + order, _COMMITTED + order])[None],
        cache,
        slice(0, 1),
        write_at=torch.arange(_PREFIX, _PREFIX + 2 * length, device=device)[None],
        visible=torch.cat([prefix, visible], 1)[None],
    )
    alone = target.read(torch.cat([ids[:, :_COMMITTED], other], 1)).hidden[:, _COMMITTED:]
    return tree.hidden, torch.cat([plain[:, _PREFIX:], alone], 1)
