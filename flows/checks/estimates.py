"""What every stage needs of a machine, by its name. Letters of the formulas as in `stages/target/estimate.py`.

No stage imports this module: a better estimate makes no artifact anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.engines.config import EmbeddedEngineConfig, SGLangEngineConfig
from draftsmith.stages.engines.rollout import RolloutConfig
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.replay.estimate import cached_read, scoring_logits
from draftsmith.stages.replay.mining import SAMPLE, MiningConfig
from draftsmith.stages.replay.options import TREE_TOKENS
from draftsmith.stages.runtime.checkpoint import GENERATIONS
from draftsmith.stages.target.config import TargetConfig
from draftsmith.stages.target.estimate import (
    ANSWER_BYTES,
    PROCESS,
    TABLES,
    TRACE_STEPS_PER_TOKEN,
    Answers,
    Sizes,
    Use,
)
from draftsmith.stages.target.source import source_kind
from draftsmith.stages.training.config import OpdConfig, SftConfig, TrainingConfig
from draftsmith.stages.training.estimate import training_memory


@dataclass(frozen=True)
class Servers:
    """SGLang servers: bytes on every one of `gpus` GPUs."""

    gpus: int
    weights: float
    requests: float  # key/value memory of all that are in flight


@dataclass(frozen=True)
class Need:
    """What one use of a stage needs: bytes of each of its processes, of the disk, and the work that takes the time."""

    memory: float = 0.0  # of the device that computes, at the peak; 0: no model is loaded
    tables: float = 0.0  # of the host, whatever the device
    loaded: float = 0.0  # that passes through the host on its way to a GPU
    processes: int = 1  # on a machine
    devices: int = 1  # GPUs that are held meanwhile, where there are any
    servers: Servers | None = None
    disk: float = 0.0  # of its artifact, tables before compression
    passing: float = 0.0  # on disk only while it runs
    makes: Answers | None = None
    work: tuple[str, float] | None = None  # decode, replay: tokens; train: block positions


def _decoding(slots: int, longest: int, drafter: bool, sizes: Sizes) -> float:
    """Return the key/value memory of target and drafter, slots · (T + block) · (2 · layers · kv_heads · head_dim · s),
    of a drafter's layers that slide, window + block at most; and a step's logits, slots · block · V · (4 + s)."""
    s, block = sizes.itemsize, sizes.block_size if drafter else 1
    kept = (longest + block) * sizes.target.kv_bytes_per_token(s)
    kept += sizes.drafter.kv_bytes(longest + block, block, s) if drafter else 0
    return float(slots * (kept + block * sizes.target.vocabulary * (4 + s)))


def _embedded(slots: int, longest: int, drafter: bool, head_tokens: int | None, sizes: Sizes) -> float:
    """P · s + P_d · s and what decoding takes; packed on a CPU are a head, V · H · s, and copies of the drafter and of
    its part of the head."""
    own = sizes.weights(sizes.drafter) + sizes.reduced_head(head_tokens)[1] if drafter else 0.0
    packed = sizes.itemsize == 2 and not sizes.accelerated  # `target/packed_linear.py`; the decoder's are replaced
    more = own + sizes.target.vocabulary * sizes.target.hidden * sizes.itemsize if packed else 0.0
    return PROCESS + sizes.weights(sizes.target) + own + more + _decoding(slots, longest, drafter, sizes)


def _launched(
    engine: SGLangEngineConfig, servers: int, in_flight: int, longest: int, drafter: bool, sizes: Sizes
) -> Servers | None:
    """A GPU needs (P · s + P_d · s + in_flight · (T + block) · key/value bytes) / tp. None: the servers run already."""
    if engine.launch is None:
        return None
    s, tp, block = sizes.itemsize, engine.launch.tensor_parallel, sizes.block_size if drafter else 1
    weights = sizes.weights(sizes.target) + (sizes.weights(sizes.drafter) if drafter else 0.0)
    entries = sizes.target.kv_bytes_per_token(s) + (sizes.drafter.kv_bytes_per_token(s) if drafter else 0)
    gpus = servers * engine.launch.data_parallel * tp  # replicas have requests of their own
    return Servers(gpus, weights / tp, in_flight * (longest + block) * entries / tp)


def _tables(answers: Answers | None) -> float:
    """Return the host memory of a stage that reads or makes so many answers, however long they are."""
    return TABLES + ANSWER_BYTES * (answers.count if answers is not None and math.isfinite(answers.count) else 0.0)


def of_target(config: TargetConfig, use: Use) -> Need:
    """The dequantised copy of a GGUF file, P · s; a folder or a hub's snapshot stays where it is."""
    copied = source_kind(config.source) in ("gguf", "package")
    return Need(disk=use.sizes.weights(use.sizes.target) if copied else 0.0)


def of_rollout(config: RolloutConfig, use: Use) -> Need:
    """With a drafter in the loop 8 · (block - 1) + 24 bytes for each verify step beside the answers."""
    sizes, drafter, engine = use.sizes, use.drafters > 0, config.engine
    longest = sizes.longest_prompt + config.sampling.max_new_tokens
    count = sum(config.counts(use.prompts).values())
    tokens = count * config.sampling.max_new_tokens
    made = Answers(longest, count, tokens * TRACE_STEPS_PER_TOKEN)
    memory, servers = 0.0, None
    if isinstance(engine, EmbeddedEngineConfig):
        memory = _embedded(engine.slots, longest, drafter, config.drafting.head_tokens, sizes)
    elif engine.launch is not None:
        servers = _launched(engine, engine.launch.servers, engine.concurrency, longest, drafter, sizes)
    disk = made.bytes + (made.verify_steps * (8 * (sizes.block_size - 1) + 24) if drafter else 0.0)
    return Need(
        memory=memory, tables=_tables(made), loaded=sizes.weights(sizes.target) if memory else 0.0, servers=servers,
        disk=disk, passing=disk, makes=made, work=("decode", tokens) if memory else None,
        devices=servers.gpus if servers else 1,
    )  # fmt: skip


def of_logs(config: LogsConfig, use: Use) -> Need:
    """Its tables, as far as the config says how many rows there are, and the target where it reads answers."""
    longest = config.max_tokens or use.sizes.positions
    steps = (config.rows or 0) * longest * TRACE_STEPS_PER_TOKEN
    made, weights = Answers(longest, config.rows or math.inf, steps), use.sizes.weights(use.sizes.target)
    memory, loaded = (PROCESS + weights, weights) if config.scored else (0.0, 0.0)
    return Need(memory, _tables(made), loaded, disk=made.bytes, passing=made.bytes, makes=made)


def of_sft(config: SftConfig, use: Use) -> Need:
    """Without steps P · s and 4 · P_d in one process, which reads the drafter and writes it, P_d · s."""
    if config.steps:
        return _of_training(config, use)
    sizes, weights = use.sizes, use.sizes.weights(use.sizes.target)
    own = sizes.weights(sizes.drafter, 4)
    return Need(PROCESS + weights + own, _tables(use.answers), weights + own, disk=sizes.weights(sizes.drafter))


def of_opd(config: OpdConfig, use: Use) -> Need:
    return _of_training(config, use, mines=config.oldest_trace > 0, scores=config.loss.needs_scores)


def _of_training(config: TrainingConfig, use: Use, *, mines: bool = False, scores: bool = False) -> Need:
    """On disk the drafter, P_d · s, and while it trains two checkpoints of 12 · P_d, which pass through the host."""
    parts, sizes = training_memory(config, use, mines=mines, scores=scores), use.sizes
    blocks = config.steps * config.sequences_per_step * config.anchors_per_sequence
    return Need(
        memory=sum(parts.values()), tables=_tables(use.answers),
        loaded=parts["target"] + 12.0 * sizes.drafter.parameters,
        processes=config.parallel.processes, devices=config.parallel.world,
        disk=sizes.weights(sizes.drafter), passing=GENERATIONS * 12.0 * sizes.drafter.parameters,
        work=("train", blocks * (sizes.block_size - 1) / config.parallel.world),
    )  # fmt: skip


def of_mining(config: MiningConfig, use: Use) -> Need:
    """P · s + P_d · s, features of one group of tokens and the logits of a chunk; scored: also the group's read into
    key/value memory. A row of the table is 8 · (block - 1) + 72 bytes."""
    sizes, tokens = use.sizes, max(config.tokens_per_target_forward, use.longest)
    weights = sizes.weights(sizes.target) + sizes.weights(sizes.drafter)
    read = 0.0
    if config.table == "scored":
        read = sum(cached_read(tokens, use.longest, sizes, max(TREE_TOKENS, sizes.block_size)).values())
    head = sizes.reduced_head(config.drafting.head_tokens)[1]
    steps = use.answers.verify_steps if use.answers is not None else 0.0
    if config.table == "sample" and use.answers is not None:
        steps *= min(1.0, SAMPLE / use.answers.count)
    disk = steps * (8 * (sizes.block_size - 1) + 72)
    return Need(
        memory=PROCESS + weights + head + tokens * sizes.feature_bytes + scoring_logits(sizes) + read,
        tables=_tables(use.answers), loaded=weights, disk=disk, passing=disk,
        work=("replay", steps / TRACE_STEPS_PER_TOKEN),
    )  # fmt: skip


def of_evaluation(config: EvaluationConfig, use: Use) -> Need:
    """P · s + drafters · P_d · s, and features of one group. On the embedded engine also what decoding takes at the
    highest concurrency, and for the comparison in float32 a second target and drafter: 4 · P + 4 · P_d."""
    sizes, longest = use.sizes, use.sizes.longest_prompt + config.sampling.max_new_tokens
    weights = sizes.weights(sizes.target) + use.drafters * sizes.weights(sizes.drafter)
    memory = PROCESS + weights + sizes.reduced_head(config.head_tokens)[1]
    memory += 2.0 * max(config.tokens_per_target_forward, longest) * sizes.feature_bytes
    servers = None
    if isinstance(config.engine, SGLangEngineConfig):  # one server at a time
        servers = _launched(config.engine, 1, max(config.concurrency), longest, True, sizes)
    else:
        memory += _decoding(max(config.concurrency), longest, True, sizes)
        if config.exactness_prompts:
            memory += sizes.weights(sizes.target, 4) + sizes.weights(sizes.drafter, 4)
    return Need(memory, _tables(use.answers), weights, servers=servers, devices=servers.gpus if servers else 1)


NEEDS: dict[str, Callable[[Any, Use], Need]] = {
    "target": of_target,
    "rollout": of_rollout,
    "logs": of_logs,
    "sft": of_sft,
    "mining": of_mining,
    "opd": of_opd,
    "evaluation": of_evaluation,
}
