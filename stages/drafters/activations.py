"""Memory formulas: bytes that a training keeps of a drafter for its backward pass, by architecture.

H, I, q, k are the widths of the residual stream, the MLP, the queries and the keys; a is the bytes of an element in the
products. Weights and residual stream are float32; under autocast (a = 2) every product keeps its own copy of its input.
A norm keeps what it reads and what it has divided, in float32. Compared with torch's memory tracker of a real step in
`tests/stages/training/test_memory.py`.
"""

from __future__ import annotations

from draftsmith.stages.target.estimate import ModelSize

CONVOLUTION = 16  # bytes per channel and side of a sublayer: its input, the shifted copy, and its kernels (two taps)
# Float32 rows of logits that a head with trained weights keeps, whatever the loss. EAGLE-3: logits,
# softmax and its gradient. DSpark: for its own loss and its confidence's, on sampled answers (top-p 12, greedy 4).
LOGIT_COPIES = {"eagle3": 3, "dspark": 9}


def by_block(kind: str, size: ModelSize, block_size: int, a: int) -> float:
    """Return the bytes of one block or chain, through all layers, the anchor's token included."""
    H, q, k = size.hidden, size.heads * size.head_dim, size.kv_heads * size.head_dim
    if kind == "eagle3":  # every step of a chain
        both = 2 * 8 * H + _inputs(3, 2 * H, a)  # embedding and feature, each with its norm
        own = (block_size / 2 + 1) * 2 * a * k  # of each step the keys and values of all steps before it
        states = 8 * H + 4 * H  # the last norm, and the states of all steps together
        return (block_size - 1) * (both + 3 * a * q + own + _mlp(size, a) + states)
    convolutions = 4 * CONVOLUTION * H if kind == "dflash2" else 0  # both sides of each of the two sublayers
    attention = 8 * H + _inputs(3, H, a) + (4 + 4 * a) * q + 6 * a * k
    return block_size * (size.layers * (attention + _mlp(size, a) + convolutions) + 12 * H)


def by_context_token(kind: str, size: ModelSize, a: int) -> float:
    """Return the bytes of one token of a trajectory, without its features."""
    H, k = size.hidden, size.kv_heads * size.head_dim
    if kind == "eagle3":
        return a * H + 2 * 8 * H + _inputs(2, 2 * H, a) + 2 * a * k
    return (8 + a) * H + size.layers * (_inputs(2, H, a) + (4 + 3 * a) * k)


def by_own_logits(kind: str, size: ModelSize, positions: int, a: int) -> float | None:
    """Return the bytes of a chunk of positions for a head with trained weights.

    None for the target's head, where the loss decides.
    """
    if kind not in LOGIT_COPIES:
        return None
    gradient = (a + 4) * size.vocabulary * size.hidden if kind == "eagle3" else 0  # of the head, per chunk
    return float(LOGIT_COPIES[kind] * positions * size.vocabulary * 4 + gradient)


def _inputs(products: int, width: int, a: int) -> int:
    """Return the bytes of the inputs of some products; in float32 all share one copy."""
    return 4 * width if a == 4 else products * a * width


def _mlp(size: ModelSize, a: int) -> int:
    """Return the bytes of a token in the MLP: norm; gate, its activation, up and their product."""
    return 8 * size.hidden + _inputs(2, size.hidden, a) + 4 * a * size.intermediate
