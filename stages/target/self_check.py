"""A target's own forwards against those that are made here of it: on a dozen tokens, whenever one is loaded.

Which layers a model has is known from its config, and tests compare families. What this adds is every other model: one
that reads no mask, keeps a state elsewhere, or changes its logits by something that a config does not say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.ranks import ALONE, Ranks

_TOKENS, _READ, _KEPT = 12, 7, 2  # of the text, those that are read at first, and of the block behind them kept
# Of a vector, relative, the median over positions: experts may be chosen otherwise at a near-tie of a coarse dtype.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@torch.no_grad()
def check_agreement(target: Any, where: str, ranks: Ranks = ALONE) -> None:
    """target: a `Target`. Raises DraftsmithError if logits, cached forwards or a tree are not a plain forward's, if
    layers leave no vector a token, or if ranks that share it have others."""
    device, vocabulary = target.device, target.embedding.shape[0]
    ids = (torch.arange(_TOKENS, device=device) * 7 + 3).remainder(vocabulary)[None]
    read = target.read(ids, (0,))
    plain = read.hidden
    if read.features is None or read.features.shape != plain.shape:
        raise DraftsmithError(
            f"target {where}: layers of {target.info.architecture} do not leave one vector a token, which is what a "
            "drafter reads; give another target"
        )
    logits = target.logit_map(F.linear(plain, target.head_weight).float())  # not `logits`: who trains packs no head
    own = target.model(input_ids=ids, use_cache=False).logits.float()
    if own.isnan().any():
        raise DraftsmithError(
            f"target {where}: its logits are no numbers in {str(target.dtype).removeprefix('torch.')}: the weights are "
            "damaged (copy or download the model again), or too large for float16 (set target.dtype)"
        )
    found = {
        "logits": (logits, own),
        "cached forwards": (_in_parts(target, ids, _KEPT), plain[:, _READ:]),
    }
    if target.layers.recurrent:  # some layers compute one token by a path of its own
        found["cached forwards of one token"] = (_in_parts(target, ids, 1), plain[:, _READ:])
    else:
        found["forwards over a tree"] = _branches(target, ids, plain)
    if ranks.target_parallel > 1:
        found["hidden states of a part"] = (plain.cpu(), ranks.gather_in_target_group(plain.cpu())[0])
    for what, (ours, theirs) in found.items():
        off = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median()
        if not off <= _TOLERANCE[target.dtype]:  # NaN too
            raise DraftsmithError(
                f"target {where}: {what} differ from the model's own by {float(off):.2g} (relative): "
                f"{target.info.architecture} computes something that is not known here; give another target"
            )


def _in_parts(target: Any, ids: torch.Tensor, kept: int) -> torch.Tensor:
    """Hidden states behind the first tokens: of a block, of which `kept` tokens are, and of what follows it. A block of
    one token alone is read before it, and forgotten."""
    cache = target.new_cache(1, _TOKENS)
    positions = torch.arange(_TOKENS, device=ids.device)[None]

    def step(begin: int, end: int, advance: bool = True) -> torch.Tensor:
        at = slice(begin, end)
        hidden: torch.Tensor = target.step(ids[:, at], positions[:, at], cache, slice(0, 1), advance=advance).hidden
        return hidden

    step(0, _READ)
    if kept == 1:
        step(_READ, _READ + 1, advance=False)
    first = step(_READ, _TOKENS, advance=False)
    target.commit(ids[:, _READ:], positions[:, _READ:], cache, 0, [kept])
    return torch.cat([first[:, :kept], step(_READ + kept, _TOKENS)], 1)


def _branches(target: Any, ids: torch.Tensor, plain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the text's last tokens and of another continuation of its beginning, in one forward."""
    device, length = ids.device, _TOKENS - _READ
    other = ids.flip(1)[:, :length]  # behind _KEPT tokens of the text
    cache = target.new_cache(1, _READ + 2 * length)
    target.step(ids[:, :_READ], torch.arange(_READ, device=device)[None], cache, slice(0, 1))
    order = torch.arange(length, device=device)
    own = order[:, None] >= order
    visible = torch.block_diag(own, own)
    prefix = (
        torch.arange(_READ, device=device)
        < torch.tensor([_READ, _KEPT], device=device).repeat_interleave(length)[:, None]
    )
    tree = target.step(
        torch.cat([ids[:, _READ:], other], 1),
        torch.cat([_READ + order, _KEPT + order])[None],
        cache,
        slice(0, 1),
        write_at=torch.arange(_READ, _READ + 2 * length, device=device)[None],
        visible=torch.cat([prefix, visible], 1)[None],
    )
    alone = target.read(torch.cat([ids[:, :_KEPT], other], 1)).hidden[:, _KEPT:]
    return tree.hidden, torch.cat([plain[:, _READ:], alone], 1)
