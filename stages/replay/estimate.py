"""Memory of one group of trajectories that the target reads and scores."""

from __future__ import annotations

from draftsmith.stages.replay.options import POSITIONS_PER_CHUNK, TREE_TOKENS
from draftsmith.stages.target.estimate import Sizes


def cached_read(tokens: int, longest: int, sizes: Sizes, tree_tokens: int = TREE_TOKENS) -> dict[str, float]:
    """Key/value memory of g tokens in g / T rows with room for a tree more each; the attention's mask of the read,
    rows · T · (T + tree) · s, and once more for each query head of a key/value head."""
    rows, groups = max(1, tokens // longest), sizes.target.heads // sizes.target.kv_heads
    copies = 1 if groups == 1 else 1 + groups
    return {
        "key/value memory": float((tokens + rows * tree_tokens) * sizes.target.kv_bytes_per_token(sizes.itemsize)),
        "attention mask": float(copies * rows * longest * (longest + tree_tokens) * sizes.itemsize),
    }


def scoring_logits(sizes: Sizes) -> float:
    """Logits of a chunk of positions in the serving dtype, in float32, and their log-softmax."""
    return float(POSITIONS_PER_CHUNK * sizes.target.vocabulary * (2 * 4 + sizes.itemsize))
