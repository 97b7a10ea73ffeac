"""DFlash2's additions to DFlash in float64: one position, one channel, one pair of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.stages.drafters.dflash.reference import Positions, Tensors


def convolved(xs: Positions, kernels: Positions, base: torch.Tensor, side: int, groups: int) -> Positions:
    """xs: inputs at the positions of one block; kernels: [2 · taps · groups] at each; base: [2, taps, H]."""
    taps, width = base.shape[1:]
    out = []
    for i, kernel in enumerate(kernels):
        dynamic = kernel.view(2, taps, groups)[side]
        y = torch.zeros_like(xs[0])
        for channel in range(width):
            for tap in range(min(taps, i + 1)):  # nothing comes from before the block
                weight = base[side, tap, channel] + dynamic[tap, channel * groups // width]
                y[channel] += weight * xs[i - tap][channel]
        out.append(y)
    return out


def around(weights: Tensors, sublayer: str, inputs: Positions) -> tuple[Positions, Callable[[Positions], Positions]]:
    """Wrap a sublayer as `dflash.reference.Around`: both kernels come from its input before the convolution."""
    base, projection = weights[f"{sublayer}_conv.base_kernel"], weights[f"{sublayer}_conv.kernel_projection.weight"]
    groups = projection.shape[0] // (2 * base.shape[1])
    kernels = [projection @ x for x in inputs]
    return (
        convolved(inputs, kernels, base, 0, groups),
        lambda outputs: convolved(outputs, kernels, base, 1, groups),
    )


def path(tensors: Tensors, hidden: torch.Tensor, head: torch.Tensor, anchor_token: int, top_k: int) -> list[int]:
    """Return the greedy path through the offsets' candidates. hidden: [K, H]; head: [V, H]."""
    weights = {name: tensor.detach().double() for name, tensor in tensors.items() if "selector" in name}
    before, behind = (weights[f"candidate_selector.{name}_codebook"] for name in ("predecessor", "successor"))
    projection = weights["candidate_selector.hidden_projection.weight"]
    previous, taken = anchor_token, []
    for h in hidden.double():
        unary = [float(row @ h) for row in head.double()]
        candidates = sorted(range(len(unary)), key=lambda token: -unary[token])[:top_k]
        gate = [float(w @ h) for w in projection]

        def score(token: int, previous: int = previous, gate: list[float] = gate, unary: list[float] = unary) -> float:
            pairs = zip(before[previous].tolist(), gate, behind[token].tolist(), strict=True)
            return unary[token] + sum(a * g * b for a, g, b in pairs)

        previous = max(candidates, key=score)
        taken.append(previous)
    return taken
