"""Bytes that a drafter's forward keeps for its backward, a token; from its config alone.

H, I, q, k are the widths of the residual stream, the MLP, the queries and the keys; a is the bytes of an element in the
products. Weights and residual stream are float32; under autocast (a = 2) every product keeps its own copy of its input.
A norm keeps what it reads and what it has divided, in float32. Held against torch's tracker of a real step:
`tests/stages/training/test_memory.py`.
"""

from __future__ import annotations

from draftsmith.stages.targets.estimate import ModelSize

CONVOLUTION = 16  # bytes a channel and side of a sublayer


def kept_by_block_token(kind: str, size: ModelSize, block_size: int, compute_bytes: int) -> float:
    """Of one token that a block or a chain consists of, through all layers.

    A convolution of two taps (DFlash2, twice around a sublayer) keeps its input, what is shifted, and its kernels.
    """
    H, mlp_width, q, k = _widths(size)
    a = compute_bytes
    mlp = 8 * H + _inputs(2, H, a) + 4 * a * mlp_width  # norm; gate, its activation, up and their product
    if kind == "eagle3":
        both = 2 * 8 * H + _inputs(3, 2 * H, a)  # embedding and feature, each with its norm
        own = (block_size / 2 + 1) * 2 * a * k  # of each step the keys and values of all steps before it
        return both + 3 * a * q + own + mlp + 8 * H + 4 * H  # the last norm, and the states of all steps together
    attention = 8 * H + _inputs(3, H, a) + (4 + 4 * a) * q + 6 * a * k
    around = 4 * CONVOLUTION * H if kind == "dflash2" else 0
    return size.layers * (attention + mlp + around) + 12 * H


def kept_by_context_token(kind: str, size: ModelSize, compute_bytes: int) -> float:
    """Of one token of a trajectory, without its features."""
    H, _, _, k = _widths(size)
    a = compute_bytes
    if kind == "eagle3":
        return a * H + 2 * 8 * H + _inputs(2, 2 * H, a) + 2 * a * k
    return (8 + a) * H + size.layers * (_inputs(2, H, a) + (4 + 3 * a) * k)


def _widths(size: ModelSize) -> tuple[int, int, int, int]:
    return size.hidden, size.intermediate, size.heads * size.head_dim, size.kv_heads * size.head_dim


def _inputs(products: int, width: int, compute_bytes: int) -> int:
    """Copies of what some products read; in float32 one, which all share."""
    return 4 * width if compute_bytes == 4 else products * compute_bytes * width
