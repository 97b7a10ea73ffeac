"""Memory and disk that a run will need, stage by stage, from its config and the sizes of target and drafter.

Every formula stands in the docstring of its function. Letters: P, P_d parameters of target and drafter, s bytes of an
element in the serving dtype, T positions of the longest sequence (prompt limit + new tokens), H hidden size, K target
layers that the drafter reads, B sequences a step, V vocabulary (or the reduced head). They are meant to be right within
a third where memory decides; activations of the target's own forward passes are small beside what is listed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from draftsmith.flows.pipeline.graph import Node
from draftsmith.stages.contract import Config
from draftsmith.stages.engines.config import EmbeddedEngineConfig, SGLangEngineConfig
from draftsmith.stages.experiments.procedural_target import ProceduralTargetConfig
from draftsmith.stages.logs import LogsConfig
from draftsmith.stages.measure.config import DRAFTERS, PREFIX, EvaluationConfig
from draftsmith.stages.mining import MiningConfig
from draftsmith.stages.prompts import PromptsConfig
from draftsmith.stages.rollout import RolloutConfig
from draftsmith.stages.targets.estimate import DTYPE_BYTES, ModelSize
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.on_policy.config import OpdConfig

PROCESS = 600e6  # Python with torch and transformers imported; on a GPU about as much for its context
_LOGIT_COPIES = 3  # float32 logits, their softmax and its gradient
_SCORING_CHUNK = 1024  # positions whose logits mining holds at once
_TREE_TOKENS = 512  # proposals scored in one forward while training, a trajectory
_TRACE_STEPS_PER_TOKEN = 0.5  # verify steps a token where nothing is known of the drafter: tau 2
_TOKEN_BYTES = 4  # an int32 in a table, before compression


@dataclass(frozen=True)
class Sizes:
    """What every estimate is made from."""

    target: ModelSize
    drafter: ModelSize
    features: int  # K
    block_size: int
    itemsize: int  # s
    longest_prompt: int
    positions: int  # the target's context

    @property
    def feature_bytes(self) -> int:
        """(K + 1) · H · s for one position: the layers that the drafter reads, and the last hidden state."""
        return (self.features + 1) * self.target.hidden * self.itemsize


@dataclass(frozen=True)
class Memory:
    """What one process of a node holds at its peak, by part, in bytes."""

    node: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        largest = sorted(self.parts.items(), key=lambda item: -item[1])
        return f"{gigabytes(self.total)}: " + ", ".join(
            f"{name} {gigabytes(value)}" for name, value in largest if value >= 0.02 * self.total
        )


@dataclass(frozen=True)
class Servers:
    """SGLang servers of a node: `needed` bytes on every one of `gpus` GPUs."""

    node: str
    gpus: int
    needed: float
    parts: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return Memory(self.node, self.parts).__str__()


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 0.95e8 else f"{size / 1e6:.0f} MB"


# -- memory ----------------------------------------------------------------------------------------------------------


def memory_of(node: Node, nodes: Mapping[str, Node], sizes: Sizes) -> Memory | None:
    """The peak of the node's own process, None where it is small (tables only)."""
    config = node.config
    match config:
        case RolloutConfig(engine=EmbeddedEngineConfig()):
            return Memory(node.name, _embedded_rollout(config, "drafter" in node.inputs, sizes))
        case SftConfig() | OpdConfig():
            source = nodes[node.inputs["trajectories"]].config
            return Memory(node.name, _training(config, source, sizes))
        case MiningConfig():
            source = nodes[node.inputs["trajectories"]].config
            return Memory(node.name, _mining(config, _longest(source, sizes), sizes))
        case ProceduralTargetConfig():
            return Memory(node.name, _fine_tuning(config, sizes))
        case EvaluationConfig():
            drafters = sum(name in DRAFTERS or name.startswith(PREFIX) for name in node.inputs)
            return Memory(node.name, _evaluation(config, drafters, sizes))
    return None


def _longest(answers: Config, sizes: Sizes) -> int:
    """T of the trajectories that a node makes."""
    if isinstance(answers, RolloutConfig):
        return sizes.longest_prompt + answers.sampling.max_new_tokens
    if isinstance(answers, LogsConfig) and answers.max_tokens is not None:
        return answers.max_tokens
    return sizes.positions


def _count(answers: Config) -> float:
    """Trajectories that a node makes at most, infinite where the config does not say."""
    if isinstance(answers, RolloutConfig) and answers.prompts is not None:
        return answers.prompts * answers.samples_per_prompt
    if isinstance(answers, LogsConfig) and answers.rows is not None:
        return answers.rows
    return math.inf


def _weights(size: ModelSize, itemsize: int) -> float:
    return float(size.parameters * itemsize)


def _reduced_head(tokens: int | None, sizes: Sizes) -> tuple[int, float]:
    """(rows of the head, bytes of its copy: none for the whole vocabulary)."""
    if tokens is None or tokens >= sizes.target.vocabulary:
        return sizes.target.vocabulary, 0.0
    return tokens, float(tokens * sizes.target.hidden * sizes.itemsize)


def _decoding(slots: int, longest: int, drafter: bool, itemsize: int, sizes: Sizes) -> dict[str, float]:
    """Key/value memory of target and drafter: slots · (T + block) · (2 · layers · kv_heads · head_dim · s).

    Logits of one verification: slots · block · V · (4 + s).
    """
    block = sizes.block_size if drafter else 1
    per_token = sizes.target.kv_bytes_per_token(itemsize)
    if drafter:
        per_token += sizes.drafter.kv_bytes_per_token(itemsize)
    return {
        "key/value memory": float(slots * (longest + block) * per_token),
        "logits": float(slots * block * sizes.target.vocabulary * (4 + itemsize)),
    }


def _embedded_rollout(config: RolloutConfig, drafter: bool, sizes: Sizes) -> dict[str, float]:
    """P · s + P_d · s + key/value memory of all slots + logits of one step."""
    assert isinstance(config.engine, EmbeddedEngineConfig)
    parts = {"process": PROCESS, "target": _weights(sizes.target, sizes.itemsize)}
    if drafter:
        parts["drafter"] = _weights(sizes.drafter, sizes.itemsize)
        parts["head"] = _reduced_head(config.drafting.head_tokens, sizes)[1]
    return parts | _decoding(config.engine.slots, _longest(config, sizes), drafter, sizes.itemsize, sizes)


def _training(config: SftConfig | OpdConfig, answers: Config, sizes: Sizes) -> dict[str, float]:
    """P · s, and 16 · P_d: float32 weights, gradients and the two moments of AdamW.

    Features kept: the smaller of feature_memory_mb and answers · T · (K + 1) · H · s; being made: twice that of one
    target forward, which reads one answer unless all are kept; of the batch: B · T · (K + 1) · H · s.
    Activations: of the queries q = B · anchors · block with an MLP of width I,
    q · layers · s · (10 · H + 4 · (heads + 2 · kv_heads) · head_dim + 4 · I), and of the context,
    B · T · layers · 4 · kv_heads · head_dim · s.
    Attention, where the kernel keeps its scores (masked with grouped heads): 2 · layers · heads · q · (T + q / B) · s.
    Logits of one chunk: 3 · positions_per_chunk · V · 4. Mining again while training: the logits of mining. A rejected
    stream: the target's read of mining.
    """
    s, longest = sizes.itemsize, _longest(answers, sizes)
    drafter, B = sizes.drafter, config.sequences_per_step
    queries = config.anchors_per_sequence * sizes.block_size
    context = 4 * drafter.kv_heads * drafter.head_dim
    act = DTYPE_BYTES[config.compute_dtype]
    tokens = None
    if config.head_tokens is not None:
        tokens = config.head_tokens + config.head_negatives + B * 64  # and the tokens of the batch: some are new
    rows, head = _reduced_head(tokens, sizes)
    mines = isinstance(config, OpdConfig) and config.oldest_trace > 0
    all_features = _count(answers) * longest * sizes.feature_bytes
    kept = config.feature_memory_mb * 2**20
    read = longest if all_features > kept else max(config.tokens_per_target_forward, longest)
    scored = {}
    if isinstance(config, OpdConfig) and config.loss.needs_scores:
        at_once = min(max(config.tokens_per_target_forward, longest), B * longest)
        scored = _cached_read(at_once, longest, _TREE_TOKENS, sizes)
    return scored | {
        "mining again": _scoring_logits(sizes) if mines else 0.0,
        "process": PROCESS,
        "target": _weights(sizes.target, s),
        "drafter with AdamW": 16.0 * drafter.parameters,
        "features": min(kept, all_features) + float((2 * read + B * longest) * sizes.feature_bytes),
        "activations": float(B * (queries * _activations(drafter, act) + longest * act * drafter.layers * context)),
        "attention": float(2 * act * drafter.layers * drafter.heads * B * queries * (longest + queries)),
        "head": head,
        "logits": float(_LOGIT_COPIES * config.positions_per_chunk * rows * 4),
    }


def _fine_tuning(config: ProceduralTargetConfig, sizes: Sizes) -> dict[str, float]:
    """16 · P as in `_training`, with a copy of s bytes where that is not 4; of the t = rows · row_tokens of a step the
    logits, 3 · t · V · 4, and activations, t · layers · s · (10 · H + 4 · (heads + 2 · kv_heads) · head_dim + 4 · I).
    """
    target, tokens = sizes.target, config.rows_per_step * config.row_tokens
    copy = sizes.itemsize if sizes.itemsize < 4 else 0
    return {
        "process": PROCESS,
        "target with AdamW": (16.0 + copy) * target.parameters,
        "text of a step": float(
            tokens * (_LOGIT_COPIES * target.vocabulary * 4 + _activations(target, sizes.itemsize))
        ),
    }


def _activations(model: ModelSize, itemsize: int) -> int:
    """Kept for the backward pass, a token."""
    heads = model.heads + 2 * model.kv_heads
    return model.layers * itemsize * (10 * model.hidden + 4 * heads * model.head_dim + 4 * model.intermediate)


def _mining(config: MiningConfig, longest: int, sizes: Sizes) -> dict[str, float]:
    """P · s + P_d · s, and what one group of tokens_per_target_forward tokens takes.

    That is a read into key/value memory, features, and the logits of 1,024 positions with their log-softmax.
    """
    tokens = max(config.tokens_per_target_forward, longest)
    return {
        "process": PROCESS,
        "target": _weights(sizes.target, sizes.itemsize),
        "drafter": _weights(sizes.drafter, sizes.itemsize),
        "head": _reduced_head(config.drafting.head_tokens, sizes)[1],
        "features": float(tokens * sizes.feature_bytes),
        "logits": _scoring_logits(sizes),
        **_cached_read(tokens, longest, max(config.tree_tokens, sizes.block_size), sizes),
    }


def _cached_read(tokens: int, longest: int, tree: int, sizes: Sizes) -> dict[str, float]:
    """Key/value memory of g tokens in g / T rows with room for a tree more each; the attention's mask of the read,
    rows · T · (T + tree) · s, and once more for each query head of a key/value head."""
    rows, groups = max(1, tokens // longest), sizes.target.heads // sizes.target.kv_heads
    copies = 1 if groups == 1 else 1 + groups
    return {
        "key/value memory": float((tokens + rows * tree) * sizes.target.kv_bytes_per_token(sizes.itemsize)),
        "attention mask": float(copies * rows * longest * (longest + tree) * sizes.itemsize),
    }


def _scoring_logits(sizes: Sizes) -> float:
    """Logits of 1,024 positions in the serving dtype, in float32, and their log-softmax."""
    return float(_SCORING_CHUNK * sizes.target.vocabulary * (2 * 4 + sizes.itemsize))


def _evaluation(config: EvaluationConfig, drafters: int, sizes: Sizes) -> dict[str, float]:
    """P · s + drafters · P_d · s, and features of one group.

    On the embedded engine also key/value memory at the highest concurrency, and for the comparison in float32 a second
    target and drafter: 4 · P + 4 · P_d.
    """
    longest = sizes.longest_prompt + config.sampling.max_new_tokens
    parts = {
        "process": PROCESS,
        "target": _weights(sizes.target, sizes.itemsize),
        "drafters": drafters * _weights(sizes.drafter, sizes.itemsize),
        "head": _reduced_head(config.head_tokens, sizes)[1],
        "features": 2.0 * max(config.tokens_per_target_forward, longest) * sizes.feature_bytes,
    }
    if isinstance(config.engine, EmbeddedEngineConfig):
        concurrency = max(config.concurrency)
        parts |= _decoding(concurrency, longest, True, sizes.itemsize, sizes)
        if config.exactness_prompts:
            parts["target in float32"] = _weights(sizes.target, 4) + _weights(sizes.drafter, 4)
    return parts


def servers_of(node: Node, sizes: Sizes) -> Servers | None:
    """Launched SGLang servers. A GPU needs (P · s + P_d · s + concurrency · (T + block) · key/value bytes) / tp.

    Fewer tokens of key/value memory only make SGLang queue; less than one request's is an error of its own.
    """
    config = node.config
    if not isinstance(config, RolloutConfig | EvaluationConfig) or not isinstance(config.engine, SGLangEngineConfig):
        return None
    launch = config.engine.launch
    if launch is None:
        return None
    drafter = isinstance(config, EvaluationConfig) or "drafter" in node.inputs
    longest = sizes.longest_prompt + config.sampling.max_new_tokens
    concurrency = max(config.concurrency) if isinstance(config, EvaluationConfig) else config.engine.concurrency
    s = DTYPE_BYTES[launch.dtype] if launch.dtype else sizes.itemsize
    parts = {"target": _weights(sizes.target, s) / launch.tensor_parallel}
    if drafter:
        parts["drafter"] = _weights(sizes.drafter, s) / launch.tensor_parallel
    decoding = _decoding(concurrency, longest, drafter, s, sizes)
    parts[f"key/value memory of {concurrency} requests"] = decoding["key/value memory"] / launch.tensor_parallel
    return Servers(node.name, launch.servers * launch.tensor_parallel, sum(parts.values()), parts)


# -- disk ------------------------------------------------------------------------------------------------------------


def disk_of(nodes: Sequence[Node], prompts: PromptsConfig, sizes: Sizes, *, copies_target: bool) -> dict[str, float]:
    """Bytes of the store, by what they are; tables before compression, so an upper bound.

    Target (dequantised ones only), and a revision made of it: P · s. Trajectories: answers · T · 4, and with a drafter
    in the loop 8 · (block - 1) + 24 for each verify step, at tau 2; mined steps: 12 · (block - 1) + 8 · top_k + 64
    each. Shards of the running stage stand beside its tables: the largest counts twice. Drafters: P_d · s each. While
    one trains, its checkpoint is there twice for a moment: 2 · 12 · P_d.
    """
    by_name = {node.name: node for node in nodes}
    parts: dict[str, float] = {"target": _weights(sizes.target, sizes.itemsize) if copies_target else 0.0}
    tables: dict[str, float] = {}
    drafters = 0
    for node in nodes:
        config = node.config
        if isinstance(config, RolloutConfig):
            tables[node.name] = _answers(config, prompts) * float(_longest(config, sizes) * _TOKEN_BYTES)
            if "drafter" in node.inputs:
                tables[node.name] += _steps(config, prompts) * (8 * (sizes.block_size - 1) + 24)
        elif isinstance(config, MiningConfig):
            source = by_name[node.inputs["trajectories"]].config
            row = 12 * (sizes.block_size - 1) + 8 * config.top_k + 64
            steps = _steps(source, prompts) if isinstance(source, RolloutConfig) else _logged_steps(source, sizes)
            tables[node.name] = steps * row
        elif isinstance(config, LogsConfig) and config.rows is not None:
            tables[node.name] = config.rows * float(_longest(config, sizes) * _TOKEN_BYTES)
        elif isinstance(config, SftConfig | OpdConfig):
            drafters += 1
        elif isinstance(config, ProceduralTargetConfig):
            parts["revision"] = _weights(sizes.target, sizes.itemsize)
    parts["trajectories and traces"] = sum(tables.values()) + max(tables.values(), default=0.0)
    parts["drafters"] = drafters * _weights(sizes.drafter, sizes.itemsize)
    parts["training checkpoint"] = (2 * 12.0 * sizes.drafter.parameters) if drafters else 0.0
    return {name: size for name, size in parts.items() if size}


def _answers(config: RolloutConfig, prompts: PromptsConfig) -> int:
    available = sum(prompts.wanted(split) for split in ("train", "validation", "heldout") if split in config.splits)
    asked = max(0, available - config.skip)
    return min(asked, config.prompts or asked) * config.samples_per_prompt


def _logged_steps(config: Config, sizes: Sizes) -> float:
    count = _count(config)
    return count * _longest(config, sizes) * _TRACE_STEPS_PER_TOKEN if math.isfinite(count) else 0.0


def _steps(config: RolloutConfig, prompts: PromptsConfig) -> float:
    return _answers(config, prompts) * config.sampling.max_new_tokens * _TRACE_STEPS_PER_TOKEN
