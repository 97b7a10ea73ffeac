"""Memory of mining: one group of trajectories read by the target, replayed and scored."""

from __future__ import annotations

from draftsmith.stages.replay.options import POSITIONS_PER_CHUNK, TREE_TOKENS
from draftsmith.stages.targets.estimate import PROCESS, Sizes


def mining_memory(
    tokens_per_group: int, head_tokens: int | None, longest: int, sizes: Sizes, *, scored: bool
) -> dict[str, float]:
    """P · s + P_d · s, and what one group of tokens_per_group tokens takes.

    That is features and the logits of a chunk of positions with their log-softmax; scored: a read into key/value memory
    too.
    """
    tokens = max(tokens_per_group, longest)
    return {
        "process": PROCESS,
        "target": sizes.weights(sizes.target),
        "drafter": sizes.weights(sizes.drafter),
        "head": sizes.reduced_head(head_tokens)[1],
        "features": float(tokens * sizes.feature_bytes),
        "logits": scoring_logits(sizes),
        **(cached_read(tokens, longest, sizes, max(TREE_TOKENS, sizes.block_size)) if scored else {}),
    }


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
