"""Probes a causal LM for its logit map and its embedding scale, since config fields do not tell.

A field of one name multiplies in one family and divides in another.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from draftsmith.stages.target.layers import causal_lm_of, decoder_of, model_class
from draftsmith.stages.target.logit_map import LogitMap

_PRODUCTS = (1e-3, 0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e6)  # of a head, tried with both signs
_TOLERANCE = 1e-4  # of a logit, relative; float32
_DIGITS = 6  # significant, of a scale or cap in a config


class UnsupportedHeadError(ValueError):
    """The logits are not those of a linear head and a `LogitMap`."""


def probe_logit_map(config: Any) -> LogitMap:
    """Return the logit map of a causal LM with this config; no weights are needed or allocated.

    Its decoder is replaced by given hidden states, and its head by the identity. Raises UnsupportedHeadError.
    """
    with torch.device("meta"):
        model = causal_lm_of(model_class(config).from_config(copy.deepcopy(config)))
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise UnsupportedHeadError(f"its head is {head}")
    products = torch.tensor([0.0, *_PRODUCTS, *(-x for x in _PRODUCTS)])
    identity = nn.Linear(len(products), len(products), bias=False)
    identity.weight.data = torch.eye(len(products))
    model.set_output_embeddings(identity)
    whole = model.base_model if model.base_model is not model else decoder_of(model)
    whole.forward = lambda *_args, **_kwargs: _Hidden(products[None, None])
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits[0, 0].float()
    except (RuntimeError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise UnsupportedHeadError(f"its logits need more than the last hidden states ({error})") from error
    return _fit(products, logits)


def _fit(products: torch.Tensor, logits: torch.Tensor) -> LogitMap:
    by_product = dict(zip(products.tolist(), logits.tolist(), strict=False))
    small, large = (products[i].item() for i in (1, len(_PRODUCTS)))
    scale = _rounded(by_product[small] / small)
    capped = abs(by_product[large]) < 0.5 * abs(scale * large)
    logit_map = LogitMap(scale, _rounded(by_product[large]) if capped else None)
    if logits.shape != products.shape or not torch.allclose(logit_map(products), logits, rtol=_TOLERANCE, atol=1e-6):
        raise UnsupportedHeadError(f"it makes {by_product[3.0]:.6g} of 3, and {by_product[30.0]:.6g} of 30")
    return logit_map


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


class _Hidden(SimpleNamespace):
    """A decoder's output with the last hidden states alone."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__(last_hidden_state=hidden)

    def __getattr__(self, _name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Any:
        return (self.last_hidden_state,)[index]


def embedding_scale(embedding: nn.Module) -> float:
    """Return the factor of an embedding module's rows, 1 for most models, found by embedding a row of a single 1.

    It is the exact number, not rounded to the module's dtype, since engines multiply by that.
    """
    module = copy.copy(embedding)
    module.__dict__["_parameters"] = {"weight": nn.Parameter(torch.ones(1, 1), requires_grad=False)}
    module.__dict__["_buffers"] = {name: buffer.cpu() for name, buffer in embedding.named_buffers(recurse=False)}
    module.__dict__["padding_idx"] = None
    return float(module(torch.zeros(1, dtype=torch.long)))
