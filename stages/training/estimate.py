"""Estimates the memory of a training step, and how many of its answers fit into one micro-batch.

The functions at the end return the bytes that a drafter keeps for its backward pass, by architecture. H, I, q, k are
the widths of the residual stream, the MLP, the queries and the keys; a is the bytes of an element in the products.
Weights and residual stream are float32; under autocast (a = 2) every product keeps its own copy of its input. A norm
keeps its input and the normalised input, in float32. `tests/stages/training/test_memory.py` compares this with torch's
memory tracker on a real step.
"""

from __future__ import annotations

import math

from draftsmith.stages.drafters.registry import KINDS
from draftsmith.stages.replay.options import POSITIONS_PER_CHUNK, TREE_TOKENS
from draftsmith.stages.targets.estimate import DTYPE_BYTES, PROCESS_BYTES, ModelSize, Sizes, StageUse
from draftsmith.stages.training.config import OpdConfig, SftConfig, TrainingConfig
from draftsmith.stages.training.loss_registry import loss_traits

USABLE = 0.85  # share of a device's memory; the allocator leaves the rest unused


def training_memory(
    config: TrainingConfig, use: StageUse, *, mines: bool = False, scores: bool = False
) -> dict[str, float]:
    """Return the bytes by purpose after the forward of a micro-batch, with the gradient of earlier ones in memory.

    Each of several processes needs this, where B is the number of answers of a step that it trains. In addition to
    `fixed_memory`:

    Activations: those that the drafter keeps for the tokens of a micro-batch (trajectories and blocks), and for each
    position with a loss its state and its gradient.
    mines: the logits of mining, if traces are mined again during training. scores: the forward of mining, if the target
    scores rejected proposals. Both come before the graph of a micro-batch.
    """
    sizes, longest, B = use.sizes, use.longest, rows_of_process(config)
    fixed = fixed_memory(config, use)
    rows = min(B, rows_at_once(config, sizes, longest, sum(fixed.values())))
    graph = {"activations": rows * row_bytes(config, sizes, longest)}
    mining = {"mining again": scoring_logits(sizes)} if mines else {}
    if scores:
        tokens_read = min(max(config.tokens_per_target_forward, longest), B * longest)
        mining |= cached_read(tokens_read, longest, sizes)
        if fixed.get("kept keys and values", 0.0) >= B * longest * sizes.target.kv_bytes_per_token(sizes.itemsize):
            del mining["key/value memory"]  # no answer is read again
    if rows == B:  # a step of one batch verifies its blocks while their graph is in memory
        return fixed | graph | mining
    return fixed | max(graph, mining, key=lambda parts: sum(parts.values()))


def fixed_memory(config: TrainingConfig, use: StageUse) -> dict[str, float]:
    """Return the bytes by purpose that do not depend on the size of micro-batches.

    Target: P · s; its layers are divided among the processes that share a target.
    Drafter: 16 · P_d for float32 weights, gradients and the two moments of AdamW (8 of the 16, which may be split over
    the processes); under autocast a copy, 2 · P_d. With an adapter, that only for the adapter's parameters, and
    4 · P_d; under autocast 2 for each parameter of an adapted map, or 6 if it was saved in float32.
    Features: feature_memory_mb at most, and none if it does not hold those of all answers; for the step's batch
    B · T · (K + 1) · H · s, twice while the target's forwards are copied into it; on a GPU the same for the next
    batch, which is read ahead unless the target is shared.
    Kept keys and values, if OPD's loss has a rejected stream and features are not kept: those of B · (T + tree)
    positions, feature_memory_mb at most, for each batch whose features are in memory.
    Logits: 5 to 7 · positions_per_chunk · V · 4; more if the head has weights of the drafter (`LOGIT_COPIES`).
    """
    sizes, longest = use.sizes, use.longest
    drafter, B = sizes.drafter, rows_of_process(config)
    moments = 8.0 / (config.parallel.world if config.parallel.shard_optimiser else 1)
    a = DTYPE_BYTES[config.compute_dtype]
    trained = trained_parameters(config, drafter)
    held = a if sizes.itemsize <= a else 4 + a
    frozen = 0.0 if config.lora is None else held * drafter.mapped + 4.0 * (drafter.parameters - drafter.mapped)
    rows_of_head, head = _reduced_head(config, sizes)
    count = use.answers.count if use.answers is not None else float("inf")
    all_features = count * longest * sizes.feature_bytes
    features = all_features if all_features <= config.feature_memory_mb * 2**20 else 0.0
    fixed = {
        "process": PROCESS_BYTES,
        "target": sizes.weights(sizes.target, sharing=config.parallel.target_parallel),
        "drafter with AdamW": ((8.0 if a == 4 else 10.0) + moments) * trained + frozen,
        "features": features + float(B * longest * sizes.feature_bytes),
        "head": head,
        "logits": _logits(config, sizes, rows_of_head),
    }
    reads_ahead = sizes.accelerated and not features and config.parallel.target_parallel == 1
    if reads_ahead:
        fixed["next batch"] = float(B * longest * sizes.feature_bytes)
    if isinstance(config, OpdConfig) and config.loss.needs_scores and not features:
        keys = B * (longest + TREE_TOKENS) * sizes.target.kv_bytes_per_token(sizes.itemsize)
        fixed["kept keys and values"] = (1 + reads_ahead) * min(float(keys), config.feature_memory_mb * 2**20)
    return fixed


def trained_parameters(config: TrainingConfig, drafter: ModelSize) -> int:
    """Return the number of parameters with gradients: the adapter's, or all of the drafter's."""
    return drafter.parameters if config.lora is None else config.lora.rank * drafter.map_widths


def _reduced_head(config: TrainingConfig, sizes: Sizes) -> tuple[int, float]:
    """Return the rows and the bytes of a step's copy of the target's head."""
    if config.head_tokens is None:
        return sizes.reduced_head(None)
    batch_tokens = config.sequences_per_step * 64  # new tokens of the batch
    return sizes.reduced_head(config.head_tokens + config.head_negatives + batch_tokens)


def head_rows(config: TrainingConfig, sizes: Sizes) -> int:
    """Return the number of tokens in a step's softmax: of the drafter's own head, or of the target's."""
    return min(_reduced_head(config, sizes)[0], sizes.drafter.vocabulary)


def cached_read(tokens: int, longest: int, sizes: Sizes, tree_tokens: int = TREE_TOKENS) -> dict[str, float]:
    """Return the bytes of a forward over g tokens in g / T rows, each with room for a tree of proposals.

    Keys and values of g + rows · tree positions; the attention mask of the proposals, rows · tree · (T + tree) · s, and
    once more for each query head of a key/value head. Sliding layers need such a mask for all T positions.
    """
    rows, groups = max(1, tokens // longest), sizes.target.heads // sizes.target.kv_heads
    queries = longest if sizes.target.windows else min(longest, tree_tokens)
    copies = 1 if groups == 1 else 1 + groups
    return {
        "key/value memory": float((tokens + rows * tree_tokens) * sizes.target.kv_bytes_per_token(sizes.itemsize)),
        "attention mask": float(copies * rows * queries * (longest + tree_tokens) * sizes.itemsize),
    }


def scoring_logits(sizes: Sizes) -> float:
    """Return the bytes of a chunk's logits in the serving dtype, in float32, and of their log-softmax."""
    return float(POSITIONS_PER_CHUNK * sizes.target.vocabulary * (2 * 4 + sizes.itemsize))


def _logits(config: TrainingConfig, sizes: Sizes, rows_of_head: int) -> float:
    a, chunk, loss = DTYPE_BYTES[config.compute_dtype], config.positions_per_chunk, _loss(config, sizes.kind)
    drafter = sizes.drafter
    if sizes.kind in LOGIT_COPIES:
        gradient = (a + 4) * drafter.vocabulary * drafter.hidden if sizes.kind == "eagle3" else 0  # of the head
        return float(LOGIT_COPIES[sizes.kind] * chunk * drafter.vocabulary * 4 + gradient)
    return float(loss_traits(loss).copies * chunk * rows_of_head * 4)


def _loss(config: TrainingConfig, kind: str) -> str:
    """Return the name of the response's loss; if the answers decide it, the one that needs more memory."""
    if isinstance(config, SftConfig):
        return KINDS[kind].recipe.loss_on(sampled=True) if config.loss == "auto" else config.loss
    assert isinstance(config, OpdConfig)
    if config.loss.response.loss != "auto":
        return config.loss.response.loss
    return "forward_kl"


def reads_distribution(config: TrainingConfig, kind: str) -> bool:
    """Return whether a step needs the target's last hidden states: for its distribution, or for DSpark's confidence."""
    return _loss(config, kind) != "cross_entropy" or KINDS[kind].recipe.reads_distribution


def row_bytes(config: TrainingConfig, sizes: Sizes, longest: int) -> float:
    """Return the bytes that the drafter keeps for backward of one trajectory with its blocks."""
    a, K, A = DTYPE_BYTES[config.compute_dtype], sizes.block_size - 1, config.anchors_per_sequence
    blocks = A * block_bytes(sizes.kind, sizes.drafter, sizes.block_size, a)
    context = longest * context_token_bytes(sizes.kind, sizes.drafter, a)
    positions = A * K * sizes.drafter.hidden * (4 + 2 * sizes.itemsize)
    return float(blocks + context + positions)


def rows_of_process(config: TrainingConfig) -> int:
    """Return the most answers of a step that one process trains."""
    return math.ceil(config.sequences_per_step / config.parallel.world)


def rows_at_once(config: TrainingConfig, sizes: Sizes, longest: int, fixed: float) -> int:
    """Return the rows of a micro-batch: from the config, or as many as fit next to `fixed` bytes; at least one."""
    if config.micro_batch_tokens is not None:
        return max(1, config.micro_batch_tokens // row_tokens(config, sizes, longest))
    memory = sizes.device_memory / (1 if sizes.accelerated else config.parallel.processes)
    fitting = (USABLE * memory - fixed) / row_bytes(config, sizes, longest)
    return max(1, int(min(fitting, rows_of_process(config))))


def row_tokens(config: TrainingConfig, sizes: Sizes, longest: int) -> int:
    """Return the tokens of one trajectory with its blocks."""
    return longest + config.anchors_per_sequence * sizes.block_size


CONVOLUTION = 16  # bytes per channel and side of a sublayer: its input, the shifted copy, and its kernels (two taps)
# Float32 rows of logits that a head with trained weights keeps, with any loss. EAGLE-3: logits,
# softmax and its gradient. DSpark: for its loss and its confidence's, on sampled answers (12 with top-p, 4 if greedy).
LOGIT_COPIES = {"eagle3": 3, "dspark": 9}


def block_bytes(kind: str, size: ModelSize, block_size: int, a: int) -> float:
    """Return the bytes of one block or chain, through all layers, the anchor's token included."""
    H, q, k = size.hidden, size.heads * size.head_dim, size.kv_heads * size.head_dim
    if kind in ("eagle3", "mtp"):  # every step of a chain
        both = 2 * 8 * H + _joined(kind, H, a, 3)  # embedding and feature, each with its norm
        entries = (block_size / 2 + 1) * 2 * a * k  # for each step, the keys and values of all steps before it
        states = 8 * H + 4 * H  # the last norm, and the states of all steps together
        return (block_size - 1) * (both + 3 * a * q + entries + _mlp(size, a) + states)
    convolutions = 4 * CONVOLUTION * H if kind == "dflash2" else 0  # both sides of each of the two sublayers
    attention = 8 * H + _inputs(3, H, a) + (4 + 4 * a) * q + 6 * a * k
    return block_size * (size.layers * (attention + _mlp(size, a) + convolutions) + 12 * H)


def context_token_bytes(kind: str, size: ModelSize, a: int) -> float:
    """Return the bytes of one token of a trajectory, without its features."""
    H, k = size.hidden, size.kv_heads * size.head_dim
    if kind in ("eagle3", "mtp"):
        return a * H + 2 * 8 * H + _joined(kind, H, a, 2) + 2 * a * k
    return (8 + a) * H + size.layers * (_inputs(2, H, a) + (4 + 3 * a) * k)


def _joined(kind: str, hidden: int, a: int, products: int) -> int:
    """Return the bytes of the inputs of queries, keys and values: EAGLE-3's are twice as wide, a head joins them."""
    if kind == "eagle3":
        return _inputs(products, 2 * hidden, a)
    return _inputs(1, 2 * hidden, a) + 8 * hidden + _inputs(products, hidden, a)


def _inputs(products: int, width: int, a: int) -> int:
    """Return the bytes of the inputs of some products; in float32 all share one copy."""
    return 4 * width if a == 4 else products * a * width


def _mlp(size: ModelSize, a: int) -> int:
    """Return the bytes of a token in the MLP: norm; gate, its activation, up and their product."""
    return 8 * size.hidden + _inputs(2, size.hidden, a) + 4 * a * (size.active or size.intermediate)
