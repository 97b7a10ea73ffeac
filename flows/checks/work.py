"""Estimates the work of stages on a GPU, and its time by a roofline: matrix products, memory traffic, kernel launches.

Operations are those of all matrix products, whoever needs them: training, the target's forwards, mining, scoring. Bytes
are what the kernels between products read and write; what a product itself moves is hidden by its operations. Launches
are those of PyTorch without compiler or CUDA graphs. All three are compared with torch's counts of real steps in
`tests/flows/checks/test_work.py`. The time is arithmetic: no GPU was measured.

Letters as in `targets/estimate.py`; also q, k widths of queries and keys, I width of the MLP, A blocks an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from draftsmith.stages.drafters.spec import StepShape
from draftsmith.stages.replay.options import TREE_TOKENS
from draftsmith.stages.targets.estimate import ModelSize, Sizes, StageUse
from draftsmith.stages.training.config import OpdConfig, TrainingConfig
from draftsmith.stages.training.estimate import head_rows, reads_distribution, rows_of_process, trained_parameters

STEPS_PER_TOKEN = 0.5  # verify steps, where nothing is known of the drafter: tau 2
_LAUNCH_S = 5e-6  # of the CPU, for one kernel
_SERVER_SHARE = 0.75  # of the roofline that a server with CUDA graphs reaches
_BLOCKS_A_STEP = 1.25  # that mining drafts for a verify step: chains that start amid an answer draft some in vain
_REMINING_ROUNDS = 6  # 4 steps a chain, and what it takes two chains to meet
_BLOCKS_PER_ROUND = 256  # as `stages/replay/chains.py`, which imports torch, has it on a GPU
_LOGITS_PER_CHUNK = 2**26  # of proposals


@dataclass(frozen=True)
class Work:
    """What a GPU computes, moves between products, and launches."""

    operations: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes, self.launches + other.launches)

    def __mul__(self, factor: float) -> Work:
        return Work(self.operations * factor, self.bytes * factor, self.launches * factor)


@dataclass(frozen=True)
class GpuRates:
    """The rates of a GPU. Kernels run one after the other: products at their rate, all others at the memory's."""

    name: str  # part of the name that the driver reports
    memory: float  # bytes
    nominal: float  # operations a second in bfloat16, by the data sheet
    products: float  # that large products reach
    bandwidth: float  # bytes a second that kernels reach

    def seconds(self, work: Work) -> float:
        """Return the time on this GPU, or that of the CPU which launches, if that is longer."""
        return max(work.operations / self.products + work.bytes / self.bandwidth, work.launches * _LAUNCH_S)


GPUS = {
    gpu.name: gpu
    for gpu in (GpuRates("H100", 80e9, 989e12, 650e12, 3.0e12), GpuRates("H200", 141e9, 989e12, 650e12, 4.3e12))
}


@dataclass(frozen=True)
class _LayerTraffic:
    """Memory traffic of a layer outside its matrix products (bytes a token, by width), and its kernel launches."""

    hidden: float
    queries: float
    keys: float
    mlp: float
    launches: float

    def work(self, size: ModelSize, tokens: float, *, layers: float, forwards: float = 1) -> Work:
        q, k = size.heads * size.head_dim, size.kv_heads * size.head_dim
        of_token = self.hidden * size.hidden + self.queries * q + self.keys * k + self.mlp * _mlp_width(size)
        return Work(0.0, layers * tokens * of_token, layers * forwards * self.launches)


_TARGET = _LayerTraffic(84, 56, 56, 10, 61)  # bfloat16, without gradient
# a drafter: float32 residual stream, products in bfloat16 by autocast
_BLOCKS, _BLOCKS_BACKWARD = _LayerTraffic(117, 126, 133, 10, 74), _LayerTraffic(289, 175, 175, 44, 160)
_CONTEXT, _CONTEXT_BACKWARD = _LayerTraffic(0, 0, 125, 0, 25), _LayerTraffic(0, 0, 175, 0, 30)
_ONCE, _ONCE_BACKWARD = (
    _LayerTraffic(103, 0, 0, 0, 37),
    _LayerTraffic(278, 0, 0, 0, 40),
)  # of a forward over context or blocks
# Bytes for each logit of a position, and launches a chunk.
_LOSS = 72.0
_ARGMAX = 6.0
_LOSS_LAUNCHES = 60
_UPDATE = 40  # bytes for each weight: AdamW reads weight, gradient and moments and writes three; clipping: 3 times
_CASTS = 24  # bytes for each weight in a micro-batch: copies in bfloat16, gradients in float32, their sum
# B A x beside W x: bytes for each input and output of a map and token of a block, launches for each use of a map
_ADAPTER, _ADAPTER_LAUNCHES = 10, 14


def step_work(
    config: TrainingConfig, use: StageUse, *, mines: bool = False, scores: bool = False, rows_at_once: int = 1
) -> dict[str, Work]:
    """Return the work of a training step of one process by phase, with answers as long as they may be.

    target: reads the answers, down to the last layer that the drafter reads, or all where the loss needs its
    distribution; nothing while features of all answers are in memory.
    mining: drafts the blocks that anchors come from. drafter: forward, loss and backward of the trained blocks.
    scoring: reads the proposals after each rejection, and the answers again where feature_memory_mb does not hold their
    keys and values.
    mines, scores: as of `training_memory`. rows_at_once: answers of a micro-batch.
    """
    sizes, T, rows = use.sizes, use.longest, rows_of_process(config)
    tokens, per_forward = rows * T, max(config.tokens_per_target_forward, T)
    forwards = math.ceil(tokens / per_forward)
    micro_batches = math.ceil(rows / rows_at_once)
    vocabulary = head_rows(config, sizes)
    steps = STEPS_PER_TOKEN * T
    if use.answers is not None and use.answers.verify_steps and math.isfinite(use.answers.count):
        steps = use.answers.verify_steps / use.answers.count
    phases: dict[str, Work] = {}
    features = use.answers.count * T * sizes.feature_bytes if use.answers is not None else math.inf
    memory, keeps_keys = config.feature_memory_mb * 2**20, False
    if features > memory:
        keys = tokens * sizes.target.kv_bytes_per_token(sizes.itemsize) / config.parallel.target_parallel
        keeps_keys = scores and keys <= memory
        whole = keeps_keys or reads_distribution(config, sizes.kind)
        layers = sizes.target.layers if whole else sizes.deepest
        phases["target"] = target_forward(sizes.target, tokens, T / 2, layers=layers, forwards=forwards)
    unknown = isinstance(config, OpdConfig) and not config.reads_table  # verify steps, until the blocks are drafted
    if unknown and config.anchors == "successors":  # type: ignore[attr-defined]
        phases["mining"] = drafting(sizes, rows, T, config.anchors_per_sequence, vocabulary, rounds=micro_batches)
    elif mines:
        rounds = micro_batches * _REMINING_ROUNDS
        phases["mining"] = drafting(sizes, rows, T, steps * _BLOCKS_A_STEP, vocabulary, rounds=rounds)
    if scores and unknown:
        verified = drafting(sizes, rows, T, config.anchors_per_sequence, vocabulary, rounds=micro_batches)
        phases["mining"] = phases.get("mining", Work()) + verified
    phases["drafter"] = _training(config, use, vocabulary, micro_batches)
    if scores and (mines or unknown):
        phases["scoring"] = suffixes(sizes, rows, config.anchors_per_sequence, T, T / steps, forwards)
        if not keeps_keys:
            phases["scoring"] += target_forward(sizes.target, tokens, T / 2, forwards=forwards)
    P = trained_parameters(config, sizes.drafter)
    of_process = _UPDATE / (config.parallel.world if config.parallel.shard_optimiser else 1)
    phases["update"] = Work(0.0, of_process * P, 100)
    return phases


def target_forward(
    size: ModelSize, tokens: float, context: float, *, layers: int | None = None, logits: float = 0, forwards: float = 1
) -> Work:
    """Return the work of the target's forwards over tokens that each see `context` positions on average.

    A token takes 2 · (2Hq + 2Hk + 3HI) + 4q · context operations a layer, and its logits 2 · V · H.
    """
    layers = size.layers if layers is None else layers
    H, q, k = size.hidden, size.heads * size.head_dim, size.kv_heads * size.head_dim
    weights = 2 * H * q + 2 * H * k + 3 * H * _mlp_width(size)
    operations = tokens * layers * (2 * weights + 4 * q * context) + 2.0 * logits * size.vocabulary * H
    moved = _TARGET.work(size, tokens, layers=layers, forwards=forwards)
    return Work(operations, moved.bytes + logits * size.vocabulary * _ARGMAX, moved.launches)


def drafting(
    sizes: Sizes, rows: float, T: float, blocks: float, vocabulary: int, *, rounds: float, context: float | None = None
) -> Work:
    """Return the work of drafting `blocks` in each of `rows` answers of T tokens, without gradient, and of argmaxes.

    context: positions before every block; left out, blocks are all over the answers.
    """
    size, K = sizes.drafter, sizes.block_size - 1
    operations = rows * _operations(sizes, T, blocks, vocabulary, training=False, context=context)
    count, encoded = rows * blocks, rows * T
    chunks = max(rounds, count * K * vocabulary / _LOGITS_PER_CHUNK)
    return (
        Work(operations, count * K * vocabulary * _ARGMAX, 6 * chunks)
        + _CONTEXT.work(size, encoded, layers=size.layers)
        + _ONCE.work(size, encoded + count * sizes.block_size, layers=1, forwards=rounds)
        + _BLOCKS.work(size, count * sizes.block_size, layers=size.layers, forwards=rounds)
    )


def replay(
    sizes: Sizes, tokens: float, T: int, drafters: int, per_forward: int, *, layers: int | None = None
) -> dict[str, Work]:
    """Return the work by phase of replaying drafters on answers of T tokens.

    layers: of the target that run; left out: those that the drafter reads.
    """
    forwards = tokens / max(T, per_forward)
    blocks = tokens * STEPS_PER_TOKEN
    drafted = drafting(
        sizes, tokens / T, T, T * STEPS_PER_TOKEN, sizes.drafter.vocabulary, rounds=blocks / _BLOCKS_PER_ROUND
    )
    layers = sizes.deepest if layers is None else layers
    target = target_forward(sizes.target, tokens, T / 2, layers=layers, forwards=forwards)
    return {"target": target, "mining": drafted * drafters}


def suffixes(sizes: Sizes, rows: float, steps: float, T: int, tau: float, groups: float) -> Work:
    """Return the work of the target's forwards over the proposals after rejections, and of their logits.

    steps: in each of `rows` answers of T tokens. groups: of answers that are read together.
    """
    leaves = steps * max(0.0, sizes.block_size - 1 - tau)
    forwards = groups * math.ceil(leaves / TREE_TOKENS)
    return target_forward(sizes.target, rows * leaves, T / 2, logits=rows * (steps + leaves), forwards=forwards)


def decoding(
    sizes: Sizes, tokens: float, *, in_flight: int, context: float, drafter: bool, gpus: int = 1, served: bool = True
) -> Work:
    """Return the work of decoding for each of the GPUs that share a replica of the target.

    Every step reads all weights, and keys and values of the requests in flight. A server's launches are in CUDA graphs.
    """
    target, own, s = sizes.target, sizes.drafter, sizes.itemsize
    block = sizes.block_size if drafter else 1
    count = in_flight * block
    step = target_forward(target, count, context, logits=count)
    moved = _weights_read(sizes, count) + in_flight * context * target.kv_bytes_per_token(s)
    if drafter:
        step += drafting(sizes, in_flight, 1 / STEPS_PER_TOKEN, 1, target.vocabulary, rounds=1, context=context)
        moved += sizes.weights(own) + target.vocabulary * target.hidden * s
        moved += in_flight * context * own.kv_bytes_per_token(s)
    of_tokens = tokens / (in_flight / STEPS_PER_TOKEN if drafter else in_flight)
    if served:  # kernels are fused
        return Work(step.operations, moved) * (of_tokens / gpus / _SERVER_SHARE)
    return (step + Work(0.0, moved)) * of_tokens


def _training(config: TrainingConfig, use: StageUse, vocabulary: int, micro_batches: int) -> Work:
    """Return the work of the drafter's forward, loss and backward."""
    sizes, size, rows, A = use.sizes, use.sizes.drafter, rows_of_process(config), config.anchors_per_sequence
    positions, context = rows * A * (sizes.block_size - 1), rows * use.longest
    tokens, rank = rows * A * sizes.block_size, None if config.lora is None else config.lora.rank
    work = Work(
        rows * _operations(sizes, use.longest, A, vocabulary, training=True, rank=rank),
        positions * vocabulary * _LOSS + micro_batches * trained_parameters(config, size) * _CASTS,
        math.ceil(positions / config.positions_per_chunk) * _LOSS_LAUNCHES + micro_batches * size.layers * 20,
    )
    if rank is not None:  # a layer uses 7 maps for blocks and 2 for the context, which `fc` is for
        uses = micro_batches * (9 * size.layers + 1)
        work += Work(0.0, _ADAPTER * tokens * size.map_widths, _ADAPTER_LAUNCHES * uses)
    forward, backward = (_CONTEXT, _BLOCKS, _ONCE), (_CONTEXT_BACKWARD, _BLOCKS_BACKWARD, _ONCE_BACKWARD)
    for of_context, of_blocks, once in (forward, backward):
        work += of_context.work(size, context, layers=size.layers, forwards=micro_batches)
        work += of_blocks.work(size, tokens, layers=size.layers, forwards=micro_batches)
        work += once.work(size, context + tokens, layers=1, forwards=micro_batches)
    return work


def _operations(
    sizes: Sizes,
    T: float,
    blocks: float,
    vocabulary: int,
    *,
    training: bool,
    context: float | None = None,
    rank: int | None = None,
) -> float:
    """Return the drafter's operations for one answer. context: as of `drafting`. rank: of a trained adapter."""
    first, last = (min(sizes.longest_prompt, T / 2), T - 2) if context is None else (context, context)
    anchors = np.linspace(first, max(first, last), max(1, round(blocks)))
    shape = StepShape(1, round(T), anchors, round(blocks * (sizes.block_size - 1)), vocabulary, rank=rank)
    return sizes.operations(shape, training=training)


def _weights_read(sizes: Sizes, tokens: float) -> float:
    """Return the bytes of the target's weights that a step over some tokens reads: of experts, the chosen ones."""
    target, routed = sizes.target, sizes.target.routed
    experts = 3 * target.layers * target.hidden * target.active / routed if routed else 0.0
    return sizes.weights(target) - sizes.itemsize * experts * (1 - routed) ** tokens


def _mlp_width(size: ModelSize) -> int:
    return size.active or size.intermediate


def describe(phases: Mapping[str, Work], gpu: GpuRates) -> str:
    """Return a step's work, time, and its share of the GPU's nominal rate, in one line."""
    total = sum(phases.values(), Work())
    seconds = {name: gpu.seconds(work) for name, work in phases.items()}
    all_seconds = sum(seconds.values())
    parts = ", ".join(f"{name} {1e3 * of_phase:,.0f}" for name, of_phase in seconds.items())
    return (
        f"{_short(total.operations / 1e12)} TFLOP, {_short(total.bytes / 1e9)} GB, {total.launches:,.0f} launches: "
        f"{1e3 * all_seconds:,.0f} ms ({parts}), MFU {total.operations / all_seconds / gpu.nominal:.0%}"
    )


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
