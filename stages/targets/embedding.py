"""What a target's embedding makes of a row of its table: models of some families multiply it."""

from __future__ import annotations

import copy

import torch
from torch import nn


def scale_of(embedding: nn.Module) -> float:
    """The number that the module multiplies rows of its weight with, 1 for most; found by asking it for a row of one 1.

    Its own dtype has no part in it: engines multiply by the number as it is written.
    """
    asked = copy.copy(embedding)
    asked.__dict__["_parameters"] = {"weight": nn.Parameter(torch.ones(1, 1), requires_grad=False)}
    asked.__dict__["_buffers"] = {name: buffer.cpu() for name, buffer in embedding.named_buffers(recurse=False)}
    asked.__dict__["padding_idx"] = None
    return float(asked(torch.zeros(1, dtype=torch.long)))
