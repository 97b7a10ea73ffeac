"""Estimates the memory and the disk space of each node, and compares them with what the machine has.

Letters of the formulas as in `stages/targets/estimate.py`. No stage imports this module, so a better estimate changes
no cache key (`tests/stages/test_digests.py`).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from draftsmith.artifacts.host import GPU_MODELS, GpuModel, memory_bytes, visible_gpus
from draftsmith.flows.checks.drafters import creates_drafter, is_drafter
from draftsmith.flows.checks.engines import runs_elsewhere
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.checks.models import DrafterPlans
from draftsmith.flows.execution.display import format_bytes
from draftsmith.flows.execution.machine import free_disk_bytes, gpu_names
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.prompts.stage import SPLITS, PromptsConfig
from draftsmith.stages.engines.config import EmbeddedEngineConfig, ServerEngineConfig
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.replay.options import TREE_TOKENS
from draftsmith.stages.replay.stage import SAMPLE, MiningConfig
from draftsmith.stages.runtime.stage import CHECKPOINTS_KEPT, Compute, Config
from draftsmith.stages.targets.config import TargetConfig, source_kind
from draftsmith.stages.targets.estimate import (
    DTYPE_BYTES,
    PROCESS_BYTES,
    AnswerCounts,
    ModelSize,
    Sizes,
    StageUse,
    target_size,
)
from draftsmith.stages.targets.info import model_path, read_target_info
from draftsmith.stages.training.config import OpdConfig, SftConfig, TrainingConfig
from draftsmith.stages.training.estimate import (
    cached_read,
    scoring_logits,
    trained_parameters,
    training_memory,
)

STEPS_PER_TOKEN = 0.5  # verify steps per token if the drafter is unknown: tau 2
_TIGHT, _TOO_MUCH = 0.85, 1.35  # needed / available: estimates are meant to be right within a third
_SERVER_FRACTION = 0.85  # share of a GPU's memory that servers take by default, about
_ADVICE = {
    "rollout": "lower engine.slots or sampling.max_new_tokens",
    "logs": "lower logs.max_tokens",
    "mining": "lower tokens_per_target_forward",
    "evaluation": "lower concurrency, tokens_per_target_forward or exactness_prompts",
}
_ADVICE_TRAINING = "lower micro_batch_tokens, feature_memory_mb, sequences_per_step or positions_per_chunk"


_TABLES = 150e6  # bytes of decoded row groups of the tables that a stage reads and writes, whatever their length
_ANSWER_BYTES = 120  # an answer's names and indices, which stay in memory
_TOKEN_BYTES = 4  # an int32 in a table, before compression


@dataclass(frozen=True)
class ServerNeed:
    """The bytes that servers need on each of `gpus` GPUs."""

    gpus: int
    weights: float
    requests: float  # key/value memory of all requests in flight


@dataclass(frozen=True)
class Need:
    """What a node needs: memory of each of its processes and disk space, in bytes."""

    memory: float = 0.0  # peak of the device that computes; 0: no model is loaded
    tables: float = 0.0  # host memory, whatever the device
    loaded: float = 0.0  # passes through host memory on its way to a GPU
    processes: int = 1  # on one machine
    servers: ServerNeed | None = None
    disk: float = 0.0  # its artifact, tables before compression
    temporary_disk: float = 0.0  # only while it runs


@dataclass(frozen=True)
class Hardware:
    """The hardware of a run: this machine, or assumed GPUs."""

    gpus: tuple[float, ...]  # bytes of each; assumed ones are always enough
    memory: float | None  # the host's; None: unknown
    model: GpuModel | None  # the GPUs'; None: unknown

    @classmethod
    def here(cls) -> Hardware:
        gpus = visible_gpus()
        model = next((model for name, model in GPU_MODELS.items() if gpus and name in gpus[0].model), None)
        return cls(tuple(gpu.memory for gpu in gpus), memory_bytes(), model)


def check_accelerators(findings: Findings, to_make: Sequence[Node]) -> None:
    """Check that torch can use the GPUs of this machine, and that Triton can compile for nodes that load a model."""
    if not (names := gpu_names()):
        return
    compiling = [node.name for node in to_make if node.stage.compute_for(node.config) is not Compute.LIGHT]
    compilers = (os.environ["CC"],) if os.environ.get("CC") else ("gcc", "clang")  # as Triton looks for one
    if compiling and not any(map(shutil.which, compilers)):
        findings.error(
            "GPUs",
            f"{' or '.join(compilers)} is missing, which Triton needs to compile kernels for {', '.join(compiling)}. "
            "Install gcc, or set CC to a C compiler.",
        )
    import torch  # planning must not import it

    if not torch.cuda.is_available():
        findings.warn(
            "GPUs",
            f"{', '.join(names)}: torch {torch.__version__} can use none, so stages compute on the CPU. Install a "
            "build for CUDA or a newer driver, or set CUDA_VISIBLE_DEVICES= (empty) to hide this warning.",
        )


def check_memory(
    findings: Findings,
    nodes: Sequence[Node],
    to_make: Sequence[Node],
    artifact: Path,
    plans: DrafterPlans,
    home: Path,
    machine: Hardware,
) -> dict[str, StageUse]:
    """Add a line for each node in `to_make` that has needs, and one for the disk. artifact: the target's folder.

    Returns what the nodes with an estimate use; nothing if the drafter's shape is unknown.
    """
    if (sizes := model_sizes(nodes, artifact, plans, machine)) is None:
        findings.skip("resources", "not estimated, because the drafter's shape is not known here")
        return {}
    uses, elsewhere = stage_uses(nodes, sizes), runs_elsewhere(nodes) and not machine.gpus
    disk, temporary = 0.0, 0.0
    for node in to_make:
        if node.name in uses:
            need = node_need(node, uses[node.name])
            disk, temporary = disk + need.disk, max(temporary, need.temporary_disk)
            _compare(findings, node, need, machine, elsewhere=elsewhere)
    if to_make:
        _compare_disk(findings, disk + temporary, home)
    return uses


def model_sizes(nodes: Sequence[Node], artifact: Path, plans: DrafterPlans, machine: Hardware) -> Sizes | None:
    """Return the sizes of the target and of a run's largest drafter; None if the drafter's is unknown.

    artifact: the target's folder. If no node needs a drafter, it counts as empty.
    """
    prompts = next((node.config for node in nodes if isinstance(node.config, PromptsConfig)), None)
    plan = max(plans.values(), key=lambda plan: plan.parameters, default=None)
    if plan is None and any(creates_drafter(node) or any(map(is_drafter, node.inputs)) for node in nodes):
        return None
    info, target = read_target_info(artifact), target_size(model_path(artifact))
    sizes = Sizes(
        target=target,
        drafter=replace(target, parameters=0, layers=0, windows=()),
        features=0,
        block_size=1,
        itemsize=DTYPE_BYTES[info.dtype],
        longest_prompt=prompts.max_prompt_tokens if prompts is not None else 0,
        positions=info.max_positions,
        kind="",
        deepest=0,
        operations=lambda *_, **__: 0.0,
        device_memory=float(min(machine.gpus, default=memory_bytes())),
        accelerated=bool(machine.gpus),
    )
    if plan is None:
        return sizes
    return replace(
        sizes,
        drafter=ModelSize.from_config(plan.config, plan.parameters, map_sizes=plan.map_sizes),
        features=len(plan.target_layer_ids),
        block_size=plan.block_size,
        kind=plan.kind,
        deepest=max(plan.target_layer_ids) + 1,
        operations=plan.operations,
    )


def stage_uses(nodes: Sequence[Node], sizes: Sizes) -> dict[str, StageUse]:
    """Return what each node uses, if its stage has an estimate. nodes: all nodes, in topological order."""
    uses: dict[str, StageUse] = {}
    answers: dict[str, AnswerCounts | None] = {}
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        if node.stage.name not in _NEEDS:
            continue
        prompts = by_name[node.inputs["prompts"]].config if "prompts" in node.inputs else None
        counts: dict[str, int] = {}
        if isinstance(prompts, PromptsConfig):
            counts = {split: prompts.prompt_count(split) for split in SPLITS}
        drafters = sum(is_drafter(name) for name in node.inputs)
        use = uses[node.name] = StageUse(sizes, counts, drafters, answers.get(node.inputs.get("trajectories", "")))
        answers[node.name] = _made_answers(node.config, use)
    return uses


def node_need(node: Node, use: StageUse) -> Need:
    """Return the need of a node with an estimate."""
    return _NEEDS[node.stage.name](node.config, use)


def _compare(findings: Findings, node: Node, need: Need, machine: Hardware, *, elsewhere: bool) -> None:
    """Add a node's line: an error if it cannot fit, a warning if it is tight. elsewhere: it runs on another machine."""
    host = need.tables + (PROCESS_BYTES + need.loaded if machine.gpus else need.memory)
    sizes = {}
    if host and machine.memory is not None:
        sizes["memory"] = host, machine.memory / need.processes
    if machine.gpus and need.memory:
        sizes["GPU memory"] = need.memory, machine.gpus[0]
    check, advice = f"{node.name}: needs", _ADVICE.get(node.stage.name, _ADVICE_TRAINING)
    fullest = max((needed / has for needed, has in sizes.values()), default=0.0)
    if need.servers is not None:
        usable = _usable(node, need.servers.gpus, machine)
        sizes[f"each of {need.servers.gpus} servers' GPUs"] = need.servers.weights + need.servers.requests, usable
        if not elsewhere and need.servers.weights >= usable:
            fullest, advice = _TOO_MUCH + 1, "raise engine.launch.tensor_parallel or memory_fraction"
    suffix = " each" if need.processes > 1 else ""
    parts = [
        f"{what} {format_bytes(needed)}{suffix}" + ("" if elsewhere else f" of {format_bytes(has)}")
        for what, (needed, has) in sizes.items()
    ]
    if need.disk:
        parts.append(f"disk {format_bytes(need.disk)}")
    text = ", ".join(parts)
    if fullest > _TOO_MUCH and not elsewhere:
        findings.error(check, f"{text}: too much. {advice.capitalize()}.")
    elif fullest > _TIGHT and not elsewhere:
        findings.warn(check, f"{text}: tight. {advice.capitalize()}.")
    elif parts:
        findings.ok(check, text)


def _usable(node: Node, servers: int, machine: Hardware) -> float:
    """Return how many bytes of each GPU a launched server may use."""
    launch = node.config.engine.launch  # type: ignore[attr-defined]
    if launch.on_cpu:
        return memory_bytes() / servers
    return min(machine.gpus, default=0.0) * float(launch.memory_fraction or _SERVER_FRACTION)


def _compare_disk(findings: Findings, needed: float, home: Path) -> None:
    has = free_disk_bytes(home)
    text = f"at most {format_bytes(needed)}; {format_bytes(has)} free at {home}"
    if needed > has:
        findings.error("disk", f"{text}: too little. Free some space or point DRAFTSMITH_HOME at another disk.")
    elif needed > _TIGHT * has:
        findings.warn("disk", f"{text}: tight")
    else:
        findings.ok("disk", text)


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
    drafter_weights = sizes.weights(sizes.drafter) + sizes.reduced_head(head_tokens)[1] if drafter else 0.0
    packed = sizes.itemsize == 2 and not sizes.accelerated  # `targets/packed_linear.py`; the decoder's are replaced
    copies = drafter_weights + sizes.target.vocabulary * sizes.target.hidden * sizes.itemsize if packed else 0.0
    weights = sizes.weights(sizes.target) + drafter_weights
    return PROCESS_BYTES + weights + copies + _decoding(slots, longest, drafter, sizes)


def _launched(
    engine: ServerEngineConfig, servers: int, in_flight: int, longest: int, drafter: bool, sizes: Sizes
) -> ServerNeed | None:
    """Return the need of launched servers: (P · s + P_d · s + in_flight · (T + block) · key/value bytes) / tp per GPU.

    Each GPU has at least the entries of one key/value head, and all of a latent. None if the config names servers that
    run already.
    """
    if engine.launch is None:
        return None
    s, tp, block = sizes.itemsize, engine.launch.tensor_parallel, sizes.block_size if drafter else 1
    weights = sizes.weights(sizes.target) + (sizes.weights(sizes.drafter) if drafter else 0.0)
    models = (sizes.target, sizes.drafter) if drafter else (sizes.target,)
    entries = sum(model.kv_bytes_per_token(s) / min(tp, model.entry_heads) for model in models)
    return ServerNeed(servers * tp, weights / tp, in_flight * (longest + block) * entries)


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


def _made_answers(config: Config, use: StageUse) -> AnswerCounts | None:
    """Return the answers that a stage makes; None if it makes none.

    Their verify steps are unknown, 0, unless the config limits both number and length of logged answers.
    """
    if isinstance(config, RolloutConfig):
        count = sum(config.counts(use.prompts).values())
        steps = count * config.sampling.max_new_tokens * STEPS_PER_TOKEN
        return AnswerCounts(use.sizes.longest_prompt + config.sampling.max_new_tokens, count, steps)
    if isinstance(config, LogsConfig):
        steps = (config.rows or 0) * (config.max_tokens or 0) * STEPS_PER_TOKEN
        return AnswerCounts(config.max_tokens or use.sizes.positions, config.rows or math.inf, steps)
    return None


def _rollout(config: RolloutConfig, use: StageUse) -> Need:
    """Return the need of decoding; with a drafter also 8 · (block - 1) + 24 bytes of disk per verify step."""
    sizes, drafter, engine, made = use.sizes, use.drafters > 0, config.engine, _made_answers(config, use)
    assert made is not None
    memory, servers = 0.0, None
    if isinstance(engine, EmbeddedEngineConfig):
        slots = engine.slots_on(gpu=sizes.accelerated)
        memory = _embedded(slots, made.longest, drafter, config.drafting.head_tokens, sizes)
    elif engine.launch is not None:
        servers = _launched(engine, engine.launch.servers, engine.concurrency, made.longest, drafter, sizes)
    disk = _table_bytes(made) + (made.verify_steps * (8 * (sizes.block_size - 1) + 24) if drafter else 0.0)
    loaded = sizes.weights(sizes.target) if memory else 0.0
    return Need(memory, _tables(made), loaded, servers=servers, disk=disk, temporary_disk=disk)


def _logs(config: LogsConfig, use: StageUse) -> Need:
    """Return the need of the tables, if the config limits their rows, and of the target if it scores the answers."""
    made, weights = _made_answers(config, use), use.sizes.weights(use.sizes.target)
    assert made is not None
    memory, loaded = (PROCESS_BYTES + weights, weights) if config.scored else (0.0, 0.0)
    return Need(memory, _tables(made), loaded, disk=_table_bytes(made), temporary_disk=_table_bytes(made))


def _sft(config: SftConfig, use: StageUse) -> Need:
    """Return the need of a training; without steps, P · s + 4 · P_d in one process that writes P_d · s."""
    if config.steps:
        return _training(config, use)
    sizes, weights = use.sizes, use.sizes.weights(use.sizes.target)
    drafter, tables = sizes.weights(sizes.drafter, 4), _tables(use.answers)
    return Need(PROCESS_BYTES + weights + drafter, tables, weights + drafter, disk=sizes.weights(sizes.drafter))


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
    return Need(
        memory=sum(parts.values()) + (0.0 if sizes.accelerated else checkpoint), tables=_tables(use.answers),
        loaded=checkpoint,
        processes=config.parallel.processes,
        disk=sizes.weights(sizes.drafter) + adapter,
        temporary_disk=(CHECKPOINTS_KEPT + 1) * checkpoint + (_table_bytes(use.answers) if use.answers else 0.0),
    )  # fmt: skip


def _mining(config: MiningConfig, use: StageUse) -> Need:
    """Return P · s + P_d · s, the features of one group of tokens and the logits of a chunk.

    With a scored table also the target's forward over the group. A round of replay takes less than the logits. A row
    of the table takes 8 · (block - 1) + 72 bytes.
    """
    sizes, tokens = use.sizes, max(config.tokens_per_target_forward, use.longest)
    weights = sizes.weights(sizes.target) + sizes.weights(sizes.drafter)
    scoring = 0.0
    if config.table == "scored":
        scoring = sum(cached_read(tokens, use.longest, sizes, max(TREE_TOKENS, sizes.block_size)).values())
    head = sizes.reduced_head(config.drafting.head_tokens)[1]
    disk = mined_steps(config, use.answers) * (8 * (sizes.block_size - 1) + 72)
    return Need(
        memory=PROCESS_BYTES + weights + head + tokens * sizes.feature_bytes + scoring_logits(sizes) + scoring,
        tables=_tables(use.answers), loaded=weights, disk=disk, temporary_disk=disk,
    )  # fmt: skip


def mined_steps(config: MiningConfig, answers: AnswerCounts | None) -> float:
    """Return how many verify steps of the answers are mined; 0 if that is unknown."""
    if answers is None:
        return 0.0
    return answers.verify_steps * (min(1.0, SAMPLE / answers.count) if config.table == "sample" else 1.0)


def _evaluation(config: EvaluationConfig, use: StageUse) -> Need:
    """Return P · s + drafters · P_d · s and the features of one group of tokens.

    On the embedded engine also what decoding takes at the highest concurrency and, for the exactness check in float32,
    a second target and drafter: 4 · P + 4 · P_d.
    """
    sizes, longest = use.sizes, use.sizes.longest_prompt + config.sampling.max_new_tokens
    weights = sizes.weights(sizes.target) + use.drafters * sizes.weights(sizes.drafter)
    memory = PROCESS_BYTES + weights + sizes.reduced_head(config.head_tokens)[1]
    memory += 2.0 * max(config.tokens_per_target_forward, longest) * sizes.feature_bytes
    servers = None
    if isinstance(config.engine, ServerEngineConfig):  # one server a GPU, or a share of them
        servers = _launched(config.engine, 1, max(config.concurrency), longest, True, sizes)
    else:
        memory += _decoding(max(config.concurrency), longest, True, sizes)
        if config.exactness_prompts:
            memory += sizes.weights(sizes.target, 4) + sizes.weights(sizes.drafter, 4)
    return Need(memory, _tables(use.answers), weights, servers=servers)


_NEEDS: dict[str, Callable[[Any, StageUse], Need]] = {
    "target": _target,
    "rollout": _rollout,
    "logs": _logs,
    "sft": _sft,
    "mining": _mining,
    "opd": _opd,
    "evaluation": _evaluation,
}
