"""What a causal LM does with the products of its head, found by asking it: names of config fields do not tell.

The same name multiplies in one family and divides in another.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from draftsmith.stages.target.layers import causal_lm_of, decoder_of, model_class
from draftsmith.stages.target.logit_map import LogitMap

_ASKED = (1e-3, 0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e6)  # products of a head, of both signs
_TOLERANCE = 1e-4  # of a logit, relative; float32
_DIGITS = 6  # that a scale or a cap is believed to have been written with


class OtherHeadError(ValueError):
    """The logits are not what a `LogitMap` makes of a linear head."""


def ask_model(config: Any) -> LogitMap:
    """What a causal LM with this config does with the products of its head. No weights are needed or allocated.

    Its decoder is replaced by given hidden states, and its head by the identity. Raises OtherHeadError.
    """
    with torch.device("meta"):
        model = causal_lm_of(model_class(config).from_config(copy.deepcopy(config)))
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise OtherHeadError(f"its head is {head}")
    asked = torch.tensor([0.0, *_ASKED, *(-x for x in _ASKED)])
    identity = nn.Linear(len(asked), len(asked), bias=False)
    identity.weight.data = torch.eye(len(asked))
    model.set_output_embeddings(identity)
    whole = model.base_model if model.base_model is not model else decoder_of(model)
    whole.forward = lambda *_args, **_kwargs: _Hidden(asked[None, None])
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits[0, 0].float()
    except (RuntimeError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise OtherHeadError(f"its logits need more than the last hidden states ({error})") from error
    return _fitted(asked, logits)


def _fitted(asked: torch.Tensor, logits: torch.Tensor) -> LogitMap:
    by_product = dict(zip(asked.tolist(), logits.tolist(), strict=False))
    small, large = (asked[i].item() for i in (1, len(_ASKED)))
    scale = _written(by_product[small] / small)
    capped = abs(by_product[large]) < 0.5 * abs(scale * large)
    found = LogitMap(scale, _written(by_product[large]) if capped else None)
    if logits.shape != asked.shape or not torch.allclose(found(asked), logits, rtol=_TOLERANCE, atol=1e-6):
        raise OtherHeadError(f"it makes {by_product[3.0]:.6g} of 3, and {by_product[30.0]:.6g} of 30")
    return found


def _written(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


class _Hidden(SimpleNamespace):
    """A decoder's output of which only the last hidden states are known."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__(last_hidden_state=hidden)

    def __getattr__(self, _name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Any:
        return (self.last_hidden_state,)[index]


def scale_of(embedding: nn.Module) -> float:
    """The number that the module multiplies rows of its weight with, 1 for most; found by asking it for a row of one 1.

    Its own dtype has no part in it: engines multiply by the number as it is written.
    """
    asked = copy.copy(embedding)
    asked.__dict__["_parameters"] = {"weight": nn.Parameter(torch.ones(1, 1), requires_grad=False)}
    asked.__dict__["_buffers"] = {name: buffer.cpu() for name, buffer in embedding.named_buffers(recurse=False)}
    asked.__dict__["padding_idx"] = None
    return float(asked(torch.zeros(1, dtype=torch.long)))
