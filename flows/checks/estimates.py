"""Estimates of what each stage needs of a machine. Letters of the formulas as in `stages/targets/estimate.py`.

No stage imports this module, so a better estimate changes no cache key (`tests/stages/test_digests.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from draftsmith.flows.checks.work import (
    STEPS_PER_TOKEN,
    Work,
    decoding,
    replay,
    step_work,
    suffixes,
)
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.engines.config import EmbeddedEngineConfig, SamplingConfig, ServerEngineConfig
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.replay.options import TREE_TOKENS
from draftsmith.stages.replay.stage import SAMPLE, MiningConfig
from draftsmith.stages.runtime.stage import CHECKPOINTS_KEPT
from draftsmith.stages.targets.config import TargetConfig, source_kind
from draftsmith.stages.targets.estimate import (
    PROCESS_BYTES,
    AnswerCounts,
    ModelSize,
    Sizes,
    StageUse,
)
from draftsmith.stages.training.config import OpdConfig, SftConfig, TrainingConfig
from draftsmith.stages.training.estimate import (
    cached_read,
    fixed_memory,
    rows_at_once,
    scoring_logits,
    trained_parameters,
    training_memory,
)

_TABLES = 150e6  # decoded row groups of the tables that a stage reads and writes, whatever their length
_ANSWER_BYTES = 120  # names and indices of an answer: all of it that stays in memory
_TOKEN_BYTES = 4  # an int32 in a table, before compression


@dataclass(frozen=True)
class ServerNeed:
    """The bytes that servers need on each of `gpus` GPUs."""

    gpus: int
    weights: float
    requests: float  # key/value memory of all requests in flight


@dataclass(frozen=True)
class Need:
    """What a node needs: memory of each of its processes and disk space in bytes, and the work that takes the time."""

    memory: float = 0.0  # peak of the device that computes; 0: no model is loaded
    tables: float = 0.0  # host memory, whatever the device
    loaded: float = 0.0  # passes through host memory on its way to a GPU
    processes: int = 1  # on one machine
    devices: int = 1  # GPUs in use, if there are any
    servers: ServerNeed | None = None
    disk: float = 0.0  # its artifact, tables before compression
    temporary_disk: float = 0.0  # only while it runs
    makes: AnswerCounts | None = None
    work: tuple[str, float] | None = None  # ("decode" or "replay", tokens) or ("train", block positions)
    on_gpu: Mapping[str, Work] = field(default_factory=dict)  # by phase, on each GPU; of a training, in one step
    steps: int = 1  # of a training
    server_starts: int = 0


def _decoding(slots: int, longest: int, drafter: bool, sizes: Sizes) -> float:
    """Return the bytes of target's and drafter's key/value caches and of one step's logits.

    Caches: slots · (T + block) · (layers · entry · s), where a drafter's sliding layer keeps at most
    window + block positions. Logits: slots · block · V · (4 + s).
    """
    s, block = sizes.itemsize, sizes.block_size if drafter else 1
    per_slot = (longest + block) * sizes.target.kv_bytes_per_token(s)
    per_slot += _kv_bytes(sizes.drafter, longest + block, block, s) if drafter else 0
    return float(slots * (per_slot + block * sizes.target.vocabulary * (4 + s)))


def _kv_bytes(model: ModelSize, positions: int, block: int, itemsize: int) -> int:
    """Return the key/value bytes of one request; a sliding layer keeps at most its window and a block."""
    entries = (model.layers - len(model.windows)) * positions + sum(min(positions, w + block) for w in model.windows)
    return entries * model.entry * itemsize


def _embedded(slots: int, longest: int, drafter: bool, head_tokens: int | None, sizes: Sizes) -> float:
    """Return P · s + P_d · s and what decoding takes.

    On a CPU in half precision also the packed weights: the head, V · H · s, and copies of the drafter and of its rows
    of the head.
    """
    own = sizes.weights(sizes.drafter) + sizes.reduced_head(head_tokens)[1] if drafter else 0.0
    packed = sizes.itemsize == 2 and not sizes.accelerated  # `targets/packed_linear.py`; the decoder's are replaced
    copies = own + sizes.target.vocabulary * sizes.target.hidden * sizes.itemsize if packed else 0.0
    return PROCESS_BYTES + sizes.weights(sizes.target) + own + copies + _decoding(slots, longest, drafter, sizes)


def _launched(
    engine: ServerEngineConfig, servers: int, in_flight: int, longest: int, drafter: bool, sizes: Sizes
) -> ServerNeed | None:
    """Return the need of launched servers, (P · s + P_d · s + in_flight · (T + block) · key/value bytes) / tp a GPU.

    Each GPU has at least the entries of one key/value head, and all of a latent. None if the config names servers that
    run already.
    """
    if engine.launch is None:
        return None
    s, tp, block = sizes.itemsize, engine.launch.tensor_parallel, sizes.block_size if drafter else 1
    weights = sizes.weights(sizes.target) + (sizes.weights(sizes.drafter) if drafter else 0.0)
    models = (sizes.target, sizes.drafter) if drafter else (sizes.target,)
    entries = sum(model.kv_bytes_per_token(s) / min(tp, model.entry_heads) for model in models)
    gpus = servers * engine.launch.data_parallel * tp  # each replica has its own requests
    return ServerNeed(gpus, weights / tp, in_flight * (longest + block) * entries)


def _tables(answers: AnswerCounts | None) -> float:
    """Return the host memory in bytes of a stage that reads or makes these answers."""
    return _TABLES + _ANSWER_BYTES * (answers.count if answers is not None and math.isfinite(answers.count) else 0.0)


def _table_bytes(answers: AnswerCounts) -> float:
    """Return the size of the answers' table, answers · T · 4; 0 if their number is unknown."""
    return answers.count * answers.longest * _TOKEN_BYTES if math.isfinite(answers.count) else 0.0


def _target(config: TargetConfig, use: StageUse) -> Need:
    """Return the disk space of a GGUF file's dequantised copy, P · s; other models are not copied."""
    copied = source_kind(config.source) in ("gguf", "package")
    return Need(disk=use.sizes.weights(use.sizes.target) if copied else 0.0)


def _rollout(config: RolloutConfig, use: StageUse) -> Need:
    """Return the need of decoding; with a drafter, 8 · (block - 1) + 24 bytes a verify step beside the answers."""
    sizes, drafter, engine = use.sizes, use.drafters > 0, config.engine
    longest = sizes.longest_prompt + config.sampling.max_new_tokens
    count = sum(config.counts(use.prompts).values())
    tokens = count * config.sampling.max_new_tokens
    made = AnswerCounts(longest, count, tokens * STEPS_PER_TOKEN)
    memory, servers, on_gpu = 0.0, None, {}
    if isinstance(engine, EmbeddedEngineConfig):
        memory = _embedded(engine.slots, longest, drafter, config.drafting.head_tokens, sizes)
        on_gpu = {"decoding": _decodes(engine, engine.slots, tokens, config.sampling, drafter, sizes)}
    elif engine.launch is not None:
        servers = _launched(engine, engine.launch.servers, engine.concurrency, longest, drafter, sizes)
        replicas = engine.launch.servers * engine.launch.data_parallel
        decoded = _decodes(engine, engine.concurrency, tokens / replicas, config.sampling, drafter, sizes)
        on_gpu = {"decoding": decoded}
    disk = _table_bytes(made) + (made.verify_steps * (8 * (sizes.block_size - 1) + 24) if drafter else 0.0)
    return Need(
        memory=memory, tables=_tables(made), loaded=sizes.weights(sizes.target) if memory else 0.0, servers=servers,
        disk=disk, temporary_disk=disk, makes=made, work=("decode", tokens) if memory else None,
        devices=servers.gpus if servers else 1, on_gpu=on_gpu, server_starts=1 if servers else 0,
    )  # fmt: skip


def _decodes(
    engine: EmbeddedEngineConfig | ServerEngineConfig,
    in_flight: int,
    tokens: float,
    sampling: SamplingConfig,
    drafter: bool,
    sizes: Sizes,
) -> Work:
    """Return the work of each GPU of a replica that decodes so many tokens, in answers of the longest length."""
    launch = engine.launch if isinstance(engine, ServerEngineConfig) else None
    context = sizes.longest_prompt + sampling.max_new_tokens / 2
    gpus = launch.tensor_parallel if launch is not None else 1
    served = launch is not None
    return decoding(sizes, tokens, in_flight=in_flight, context=context, drafter=drafter, gpus=gpus, served=served)


def _logs(config: LogsConfig, use: StageUse) -> Need:
    """Return the need of the tables, if the config limits their rows, and of the target if it scores the answers."""
    longest = config.max_tokens or use.sizes.positions
    steps = (config.rows or 0) * longest * STEPS_PER_TOKEN
    made, weights = AnswerCounts(longest, config.rows or math.inf, steps), use.sizes.weights(use.sizes.target)
    memory, loaded = (PROCESS_BYTES + weights, weights) if config.scored else (0.0, 0.0)
    return Need(memory, _tables(made), loaded, disk=_table_bytes(made), temporary_disk=_table_bytes(made), makes=made)


def _sft(config: SftConfig, use: StageUse) -> Need:
    """Return the need of a training; without steps, P · s + 4 · P_d in one process that writes P_d · s."""
    if config.steps:
        return _training(config, use)
    sizes, weights = use.sizes, use.sizes.weights(use.sizes.target)
    own = sizes.weights(sizes.drafter, 4)
    return Need(PROCESS_BYTES + weights + own, _tables(use.answers), weights + own, disk=sizes.weights(sizes.drafter))


def _opd(config: OpdConfig, use: StageUse) -> Need:
    """Return the need of a training that may replay and score its answers again, and copies the steps that it reads."""
    need = _training(config, use, mines=config.oldest_trace > 0, scores=config.loss.needs_scores)
    steps = use.answers.verify_steps if config.reads_table and use.answers is not None else 0.0
    return replace(need, temporary_disk=need.temporary_disk + steps * (8 * (use.sizes.block_size - 1) + 24))


def _training(config: TrainingConfig, use: StageUse, *, mines: bool = False, scores: bool = False) -> Need:
    """Return the need of `training_memory` and of a drafter on disk, P_d · s, with its adapter.

    Checkpoints take 12 bytes for each trained parameter: those that are kept and a new one on disk, and the new one in
    host memory. A copy of the answers' table is on disk too. The target's weights go to a GPU tensor by tensor.
    """
    parts, sizes = training_memory(config, use, mines=mines, scores=scores), use.sizes
    trained = trained_parameters(config, sizes.drafter)
    checkpoint, adapter = 12.0 * trained, 0.0 if config.lora is None else 4.0 * trained
    blocks = config.steps * config.sequences_per_step * config.anchors_per_sequence
    at_once = rows_at_once(config, sizes, use.longest, sum(fixed_memory(config, use).values()))
    return Need(
        memory=sum(parts.values()) + (0.0 if sizes.accelerated else checkpoint), tables=_tables(use.answers),
        loaded=checkpoint,
        processes=config.parallel.processes, devices=config.parallel.world,
        disk=sizes.weights(sizes.drafter) + adapter,
        temporary_disk=(CHECKPOINTS_KEPT + 1) * checkpoint + (_table_bytes(use.answers) if use.answers else 0.0),
        work=("train", blocks * (sizes.block_size - 1) / config.parallel.world),
        steps=config.steps, on_gpu=step_work(config, use, mines=mines, scores=scores, rows_at_once=at_once),
    )  # fmt: skip


def _mining(config: MiningConfig, use: StageUse) -> Need:
    """Return P · s + P_d · s, the features of one group of tokens and the logits of a chunk.

    With a scored table also the target's forward over the group. A round of replay takes less than the logits. A row
    of the table has 8 · (block - 1) + 72 bytes.
    """
    sizes, tokens = use.sizes, max(config.tokens_per_target_forward, use.longest)
    weights = sizes.weights(sizes.target) + sizes.weights(sizes.drafter)
    scoring = 0.0
    if config.table == "scored":
        scoring = sum(cached_read(tokens, use.longest, sizes, max(TREE_TOKENS, sizes.block_size)).values())
    head = sizes.reduced_head(config.drafting.head_tokens)[1]
    steps = use.answers.verify_steps if use.answers is not None else 0.0
    if config.table == "sample" and use.answers is not None:
        steps *= min(1.0, SAMPLE / use.answers.count)
    disk = steps * (8 * (sizes.block_size - 1) + 72)
    on_gpu = {}
    if use.answers is not None and math.isfinite(use.answers.count) and steps:
        T, read = use.longest, steps / STEPS_PER_TOKEN  # tokens
        on_gpu = replay(sizes, read, T, 1, config.tokens_per_target_forward, layers=sizes.target.layers)
        if config.table == "scored":
            groups = read / max(T, config.tokens_per_target_forward)
            on_gpu["scoring"] = suffixes(sizes, read / T, T * STEPS_PER_TOKEN, T, 1 / STEPS_PER_TOKEN, groups)
    return Need(
        memory=PROCESS_BYTES + weights + head + tokens * sizes.feature_bytes + scoring_logits(sizes) + scoring,
        tables=_tables(use.answers), loaded=weights, disk=disk, temporary_disk=disk,
        work=("replay", steps / STEPS_PER_TOKEN) if steps else None, on_gpu=on_gpu,  # of logs without `rows`: unknown
    )  # fmt: skip


def _evaluation(config: EvaluationConfig, use: StageUse) -> Need:
    """Return P · s + drafters · P_d · s and the features of one group of tokens.

    On the embedded engine also what decoding takes at the highest concurrency and, for the exactness check in float32,
    a second target and drafter: 4 · P + 4 · P_d.
    """
    sizes, longest = use.sizes, use.sizes.longest_prompt + config.sampling.max_new_tokens
    weights = sizes.weights(sizes.target) + use.drafters * sizes.weights(sizes.drafter)
    memory = PROCESS_BYTES + weights + sizes.reduced_head(config.head_tokens)[1]
    memory += 2.0 * max(config.tokens_per_target_forward, longest) * sizes.feature_bytes
    servers, starts = None, 0
    if isinstance(config.engine, ServerEngineConfig):  # one server at a time
        servers = _launched(config.engine, 1, max(config.concurrency), longest, True, sizes)
        starts = config.rounds * (1 + use.drafters) + use.drafters * len(config.block_sizes or ())
    else:
        memory += _decoding(max(config.concurrency), longest, True, sizes)
        if config.exactness_prompts:
            memory += sizes.weights(sizes.target, 4) + sizes.weights(sizes.drafter, 4)
    on_gpu = {"decoding": _timed_runs(config, use)}
    if use.answers is not None and math.isfinite(use.answers.count):
        tokens = use.answers.count * use.answers.longest
        on_gpu |= replay(sizes, tokens, use.longest, use.drafters, config.tokens_per_target_forward)
    return Need(
        memory, _tables(use.answers), weights, servers=servers, devices=servers.gpus if servers else 1,
        on_gpu=on_gpu, server_starts=starts,
    )  # fmt: skip


def _timed_runs(config: EvaluationConfig, use: StageUse) -> Work:
    """Return the work of all arms that decode in all rounds and settings, and of the choice of their block sizes."""
    longest, first = config.sampling.max_new_tokens, config.concurrency[0]
    temperatures = len(config.temperatures or (config.sampling.temperature,))

    def run(prompts: int, in_flight: int, drafter: bool) -> Work:
        return _decodes(config.engine, in_flight, prompts * longest, config.sampling, drafter, use.sizes)

    chosen = use.drafters * len(config.block_sizes or ()) * max(config.validation_prompts, first)
    total = run(chosen, first, True)
    for in_flight in config.concurrency:
        both = run(config.speed_prompts, in_flight, False) + run(config.speed_prompts, in_flight, True) * use.drafters
        total += both * (config.rounds * temperatures)
    return total


NEEDS: dict[str, Callable[[Any, StageUse], Need]] = {
    "target": _target,
    "rollout": _rollout,
    "logs": _logs,
    "sft": _sft,
    "mining": _mining,
    "opd": _opd,
    "evaluation": _evaluation,
}
