"""Estimates how long a run's nodes take: by its last run, or else by the FLOP of their matrix products.

Only trainings and mining have an estimate: their FLOP, divided by the GPU's rate in `GPU_MODELS`. A drafter's FLOP are
those that a training counts (`tflop` in its metrics). Decoding waits for memory rather than for products, so the time
of rollouts and evaluations is known after their first run. Tests compare the FLOP with torch's counts of real steps
(`tests/flows/checks/test_hours.py`). Letters as in `targets/estimate.py`; also q, k widths of queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from draftsmith.artifacts.host import GpuModel
from draftsmith.artifacts.store.manifest import Manifest
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.checks.memory import STEPS_PER_TOKEN, mined_steps
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import format_duration
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.drafters.spec import StepShape
from draftsmith.stages.replay.stage import MiningConfig
from draftsmith.stages.runtime.stage import Compute
from draftsmith.stages.targets.estimate import ModelSize, Sizes, StageUse
from draftsmith.stages.training.config import OpdConfig, TrainingConfig
from draftsmith.stages.training.estimate import head_rows, reads_distribution, rows_of_process


def check_hours(
    findings: Findings,
    to_make: Sequence[Node],
    uses: Mapping[str, StageUse],
    config: RunOptions,
    made: Sequence[Manifest],
    gpu: GpuModel | None,
) -> None:
    """Add a line with the time of the nodes in `to_make`, without those that only read and write files.

    Another line has the nodes that the config skips, with the time that they took when they were last made.

    uses: what the nodes with an estimate use. made: artifacts of earlier runs, oldest first. gpu: None if it is
    unknown.
    """
    # `seconds` of a continued training covers the steps of all attempts
    last = {m.node: max(m.duration_s, m.metrics.get("seconds", 0.0)) for m in made if m.run == config.name}
    repeated, estimated, unknown = dict[str, float](), dict[str, float](), []
    for node in to_make:
        if node.name in last:
            repeated[node.name] = last[node.name]
        elif gpu is not None and node.name in uses and (flop := node_flop(node, uses[node.name])):
            estimated[node.name] = flop / gpu.rate / (config.stages.shards if node.stage.sharded else 1)
        elif node.stage.compute_for(node.config) is not Compute.LIGHT:
            unknown.append(node.name)
    parts = [f"about {format_duration(sum((repeated | estimated).values()))}"] if repeated or estimated else []
    if repeated:
        parts.append(f"as in the last run: {_listed(repeated)}")
    if gpu is not None and estimated:
        parts.append(f"if a GPU reaches {gpu.rate / 1e12:.0f} TFLOP/s (not measured): {_listed(estimated)}")
    if unknown:
        parts.append(f"known after a first run: {', '.join(unknown)}")
    if parts:
        findings.ok("time", "; ".join(parts))
    if config.skipped:
        saved = {name: last[name] for name in config.skipped if name in last}
        took = f": about {format_duration(sum(saved.values()))} when last made ({_listed(saved)})" if saved else ""
        findings.ok("saved", f"{', '.join(config.skipped)} are skipped{took}")


def node_flop(node: Node, use: StageUse) -> float:
    """Return the FLOP of a training or of mining on each of its GPUs; 0 for another stage, and if they are unknown."""
    config = node.config
    if isinstance(config, TrainingConfig):
        return config.steps * sum(step_flop(config, use).values())
    return _mining_flop(config, use) if isinstance(config, MiningConfig) else 0.0


def step_flop(config: TrainingConfig, use: StageUse) -> dict[str, float]:
    """Return the FLOP of a training step of one process by phase, for answers of the greatest length.

    target: reads the answers, down to the last layer that the drafter reads, or all where the loss needs its
    distribution. mining: drafts the blocks that anchors come from. drafter: forward and backward of the trained blocks.
    scoring: reads the proposals after each rejection, and the answers again where feature_memory_mb does not hold their
    keys and values.
    """
    sizes, T, rows, blocks = use.sizes, use.longest, rows_of_process(config), config.anchors_per_sequence
    vocabulary, rank = head_rows(config, sizes), None if config.lora is None else config.lora.rank
    opd = config if isinstance(config, OpdConfig) else None
    scores = opd is not None and opd.loss.needs_scores
    keys = rows * T * sizes.target.kv_bytes_per_token(sizes.itemsize) / config.parallel.target_parallel
    keeps_keys = scores and keys <= config.feature_memory_mb * 2**20
    whole = keeps_keys or reads_distribution(config, sizes.kind)
    trained = _drafter_flop(sizes, T, blocks, vocabulary, training=True, rank=rank)
    flop = {
        "target": target_flop(sizes.target, rows * T, T / 2, layers=None if whole else sizes.deepest),
        "drafter": rows * trained,
    }
    if opd is None:
        return flop
    steps, drafted = STEPS_PER_TOKEN * T, 0.0
    if use.answers is not None and use.answers.verify_steps:
        steps = use.answers.verify_steps / use.answers.count
    if opd.oldest_trace:
        drafted = steps
    elif not opd.reads_table:  # blocks are verified as they are drafted
        drafted = blocks * ((opd.anchors == "successors") + scores)
    flop["mining"] = rows * _drafter_flop(sizes, T, drafted, vocabulary) if drafted else 0.0
    if scores and drafted:
        flop["scoring"] = _scoring_flop(sizes, T, rows * blocks, T / steps, opd.loss.rejected.offsets)
        if not keeps_keys:
            flop["scoring"] += target_flop(sizes.target, rows * T, T / 2)
    return flop


def target_flop(
    size: ModelSize, tokens: float, context: float, *, layers: int | None = None, logits: float = 0
) -> float:
    """Return the FLOP of the target's forwards over tokens that each see `context` positions on average.

    A token takes 2 · (2Hq + 2Hk + 3HI) + 4q · context per layer, and its logits 2 · V · H.
    """
    H, q, k = size.hidden, size.heads * size.head_dim, size.kv_heads * size.head_dim
    weights = 2 * H * q + 2 * H * k + 3 * H * (size.active or size.intermediate)
    layer_flop = tokens * (size.layers if layers is None else layers) * (2 * weights + 4 * q * context)
    return layer_flop + 2.0 * logits * size.vocabulary * H


def _mining_flop(config: MiningConfig, use: StageUse) -> float:
    """Return the FLOP of mining: the target reads the answers, and the drafter drafts every verify step."""
    sizes, T, steps = use.sizes, use.longest, mined_steps(config, use.answers)
    tokens = steps / STEPS_PER_TOKEN
    flop = target_flop(sizes.target, tokens, T / 2)
    flop += tokens / T * _drafter_flop(sizes, T, T * STEPS_PER_TOKEN, sizes.drafter.vocabulary)
    return flop + (_scoring_flop(sizes, T, steps, 1 / STEPS_PER_TOKEN) if config.table == "scored" else 0.0)


def _scoring_flop(sizes: Sizes, T: int, steps: float, tau: float, offsets: int | None = None) -> float:
    """Return the FLOP of the target's forwards over the proposals after rejections, and of their logits."""
    leaves = steps * min(max(0.0, sizes.block_size - 1 - tau), (offsets or sizes.block_size) - 1)
    return target_flop(sizes.target, leaves, T / 2, logits=steps + leaves)


def _drafter_flop(
    sizes: Sizes, T: int, blocks: float, vocabulary: int, *, training: bool = False, rank: int | None = None
) -> float:
    """Return the drafter's FLOP for `blocks` blocks spread over an answer of T tokens. rank: a trained adapter's."""
    first = min(sizes.longest_prompt, T / 2)
    anchors = np.linspace(first, max(first, T - 2), max(1, round(blocks)))
    shape = StepShape(1, T, anchors, round(blocks * (sizes.block_size - 1)), vocabulary, rank=rank)
    return sizes.operations(shape, training=training)


def _listed(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {format_duration(time)}" for name, time in seconds.items())
