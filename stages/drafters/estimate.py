"""What the formulas of a drafter's memory in training share; those of an architecture are in its `planning.py`.

H, I, q, k are the widths of the residual stream, the MLP, the queries and the keys; a is the bytes of an element in the
products. Weights and residual stream are float32; under autocast (a = 2) every product keeps its own copy of its input.
A norm keeps what it reads and what it has divided, in float32. Held against torch's tracker of a real step:
`tests/stages/training/test_memory.py`.
"""

from __future__ import annotations

from draftsmith.stages.targets.estimate import ModelSize

LOGIT_COPIES = 3  # float32 logits, their softmax and its gradient


def widths(size: ModelSize) -> tuple[int, int, int, int]:
    """H, I, q, k."""
    return size.hidden, size.intermediate, size.heads * size.head_dim, size.kv_heads * size.head_dim


def inputs(products: int, width: int, compute_bytes: int) -> int:
    """Copies of what some products read; in float32 one, which all share."""
    return 4 * width if compute_bytes == 4 else products * compute_bytes * width


def mlp(size: ModelSize, compute_bytes: int) -> int:
    """Of a token: norm; gate, its activation, up and their product."""
    return 8 * size.hidden + inputs(2, size.hidden, compute_bytes) + 4 * compute_bytes * size.intermediate
