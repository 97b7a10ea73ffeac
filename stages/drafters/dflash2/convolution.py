"""Grouped dynamic convolution over the positions of a block, around a sublayer.

Source: the parameters and the order of SGLang's `DFlashGroupedConv` (srt/models/dflash.py, 0.5.20 and 0.5.23). Output
c at position i is Σ_t (base[t, c] + δ[i, t, group of c]) · x[i - t, c]; a tap never reaches into another block. One
projection of a sublayer's input gives δ of both sides, before the sublayer and behind it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

BEFORE, BEHIND = 0, 1  # of the sublayer: the kernels' first index


class BlockConvolution(nn.Module):
    """Parameter names are SGLang's: `base_kernel` [2, taps, H] and `kernel_projection`. The identity at the start."""

    def __init__(self, hidden_size: int, taps: int, group_size: int):
        super().__init__()
        self.taps, self.groups = taps, hidden_size // group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, hidden_size))
        self.kernel_projection = nn.Linear(hidden_size, 2 * taps * self.groups, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """What comes in goes out, before and behind; gradients of all parameters exist there."""
        self.base_kernel.zero_()
        self.base_kernel[:, 0] = 1.0
        self.kernel_projection.weight.zero_()

    def before(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [..., S, H] of whole blocks → the sublayer's input, and the kernels for its output."""
        kernels = self.kernel_projection(x).unflatten(-1, (2, self.taps, self.groups))
        return self._convolve(x, kernels[..., BEFORE, :, :], BEFORE), kernels[..., BEHIND, :, :]

    def behind(self, x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """x: the sublayer's output, like its input."""
        return self._convolve(x, kernels, BEHIND)

    def _convolve(self, x: torch.Tensor, kernels: torch.Tensor, side: int) -> torch.Tensor:
        """kernels: [..., S, taps, groups]."""
        grouped = x.unflatten(-1, (self.groups, -1))
        base = self.base_kernel[side].unflatten(-1, (self.groups, -1))  # [taps, groups, H / groups]
        out = (base[0] + kernels[..., 0, :, None]) * grouped
        for tap in range(1, min(self.taps, x.shape[-2])):  # what lies in front of the block counts for nothing
            shifted = F.pad(grouped[..., :-tap, :, :], (0, 0, 0, 0, tap, 0))
            out = out + (base[tap] + kernels[..., tap, :, None]) * shifted
        return out.flatten(-2)
