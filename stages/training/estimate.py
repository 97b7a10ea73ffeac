"""Memory and disk of a training step."""

from __future__ import annotations

from draftsmith.stages.replay.estimate import cached_read, scoring_logits
from draftsmith.stages.targets.estimate import DTYPE_BYTES, PROCESS, Estimate, ModelSize, Use
from draftsmith.stages.training.config import TrainingConfig

LOGIT_COPIES = 3  # float32 logits, their softmax and its gradient


def training_estimate(config: TrainingConfig, use: Use, *, mines: bool = False, scores: bool = False) -> Estimate:
    """P · s, and 16 · P_d: float32 weights, gradients and the two moments of AdamW.

    Features kept: the smaller of feature_memory_mb and answers · T · (K + 1) · H · s; being made: twice that of one
    target forward, which reads one answer unless all are kept; of the batch: B · T · (K + 1) · H · s.
    Activations: of the queries q = B · anchors · block with an MLP of width I,
    q · layers · s · (10 · H + 4 · (heads + 2 · kv_heads) · head_dim + 4 · I), and of the context,
    B · T · layers · 4 · kv_heads · head_dim · s.
    Attention, where the kernel keeps its scores (masked with grouped heads): 2 · layers · heads · q · (T + q / B) · s.
    Logits of one chunk: 3 · positions_per_chunk · V · 4. mines: traces again while training, the logits of mining.
    scores: the target judges rejected proposals, the read of mining.

    On disk the drafter, P_d · s, and while it trains two checkpoints for a moment: 2 · 12 · P_d.
    """
    sizes, longest = use.sizes, use.longest
    drafter, B = sizes.drafter, config.sequences_per_step
    queries = config.anchors_per_sequence * sizes.block_size
    context = 4 * drafter.kv_heads * drafter.head_dim
    act = DTYPE_BYTES[config.compute_dtype]
    tokens = None
    if config.head_tokens is not None:
        tokens = config.head_tokens + config.head_negatives + B * 64  # and the tokens of the batch: some are new
    rows, head = sizes.reduced_head(tokens)
    count = use.answers.count if use.answers is not None else float("inf")
    all_features = count * longest * sizes.feature_bytes
    kept = config.feature_memory_mb * 2**20
    read = longest if all_features > kept else max(config.tokens_per_target_forward, longest)
    scored = {}
    if scores:
        scored = cached_read(min(max(config.tokens_per_target_forward, longest), B * longest), longest, sizes)
    memory = scored | {
        "mining again": scoring_logits(sizes) if mines else 0.0,
        "process": PROCESS,
        "target": sizes.weights(sizes.target),
        "drafter with AdamW": 16.0 * drafter.parameters,
        "features": min(kept, all_features) + float((2 * read + B * longest) * sizes.feature_bytes),
        "activations": float(B * (queries * activations(drafter, act) + longest * act * drafter.layers * context)),
        "attention": float(2 * act * drafter.layers * drafter.heads * B * queries * (longest + queries)),
        "head": head,
        "logits": float(LOGIT_COPIES * config.positions_per_chunk * rows * 4),
    }
    return Estimate(
        memory=memory,
        files={"drafters": sizes.weights(drafter)},
        passing={"training checkpoint": 2 * 12.0 * drafter.parameters},
    )


def activations(model: ModelSize, itemsize: int) -> int:
    """Kept for the backward pass, a token."""
    heads = model.heads + 2 * model.kv_heads
    return model.layers * itemsize * (10 * model.hidden + 4 * heads * model.head_dim + 4 * model.intermediate)
