"""Estimates the memory, disk space, time and cost of each node, and compares them with what the machine has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from draftsmith.artifacts.host import memory_bytes, visible_gpus
from draftsmith.artifacts.store.manifest import Manifest
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.flows.checks.drafters import creates_drafter, is_drafter
from draftsmith.flows.checks.engines import runs_elsewhere
from draftsmith.flows.checks.estimates import NEEDS, Need
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.checks.models import DrafterPlans
from draftsmith.flows.checks.work import GPUS, GpuRates, describe
from draftsmith.flows.config.options import StageOptions
from draftsmith.flows.execution.display import format_bytes, format_duration
from draftsmith.flows.execution.machine import free_disk_bytes, gpu_names
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.data.prompts import SPLITS, PromptsConfig
from draftsmith.stages.targets.estimate import DTYPE_BYTES, PROCESS_BYTES, ModelSize, Sizes, StageUse, target_size
from draftsmith.stages.targets.info import model_path, read_target_info

_TIGHT, _TOO_MUCH = 0.85, 1.35  # needed / available: estimates are meant to be right within a third
_SERVER_FRACTION = 0.85  # of a GPU's memory that servers take by default, about
_SERVER_START_S = 60.0  # assumed
_ADVICE = {
    "rollout": "lower engine.slots or sampling.max_new_tokens",
    "logs": "lower logs.max_tokens",
    "mining": "lower tokens_per_target_forward",
    "evaluation": "lower concurrency, tokens_per_target_forward or exactness_prompts",
}
_ADVICE_TRAINING = "lower micro_batch_tokens, feature_memory_mb, sequences_per_step or positions_per_chunk"


@dataclass(frozen=True)
class MeasuredRate:
    """Work per second that was measured on one device; with a larger target it is proportionally less."""

    device: str  # part of a GPU's name, or `CPU`
    work: str  # as in `Need.work`
    a_second: float
    parameters: float  # of the target
    where: str


# from tests/benchmarks/README.md
_ON = "SmolLM2-135M on 2 cores of AMD Zen 4"
MEASURED_RATES = (
    MeasuredRate("CPU", "decode", 501, 135e6, f"{_ON}, 32 in flight"),
    MeasuredRate("CPU", "replay", 318, 135e6, _ON),
    MeasuredRate("CPU", "train", 348, 135e6, f"{_ON}, one thread"),
)


@dataclass(frozen=True)
class Hardware:
    """What a run would compute on: this machine, or GPUs that are assumed."""

    gpus: tuple[float, ...]  # bytes of each; of assumed ones there are enough
    memory: float | None  # of the host; None: unknown
    rates: GpuRates | None  # of a GPU whose time can be estimated
    device: str  # part of it is a MeasuredRate's

    @classmethod
    def here(cls) -> Hardware:
        gpus = visible_gpus()
        model = gpus[0].model if gpus else "CPU"
        rates = next((gpu for name, gpu in GPUS.items() if name in model), None)
        return cls(tuple(gpu.memory for gpu in gpus), memory_bytes(), rates, model)

    @classmethod
    def assumed(cls, gpu: GpuRates) -> Hardware:
        return cls((gpu.memory,), None, gpu, gpu.name)


def check_accelerators(findings: Findings) -> None:
    """Warn if torch cannot use the GPUs of this machine."""
    if not (names := gpu_names()):
        return
    import torch  # planning must not import it

    if not torch.cuda.is_available():
        findings.warn(
            "GPUs",
            f"{', '.join(names)}: torch {torch.__version__} can use none, so stages compute on the CPU. Install a "
            "build for CUDA or a newer driver, or set CUDA_VISIBLE_DEVICES= (empty) to hide this warning.",
        )


def check_resources(
    findings: Findings,
    nodes: Sequence[Node],
    to_make: Sequence[Node],
    sizes: Sizes | None,
    home: Path,
    machine: Hardware,
    options: StageOptions,
) -> None:
    """Add lines for each node in `to_make`, and one for the whole run. sizes: from `model_sizes`."""
    if sizes is None:
        findings.skip("resources", "not estimated, because the drafter's shape is not known here")
        return
    needs, price = _needs(nodes, sizes), options.price_per_hour
    history = _History(open_store(home).list() if machine.memory is not None else [], nodes)
    elsewhere = runs_elsewhere(nodes) and not machine.gpus
    disk, temporary, seconds, hours, unknown = 0.0, 0.0, 0.0, 0.0, []
    for node in to_make:
        need = needs.get(node.name, Need())
        took, how = _time(node, need, history, sizes, machine, elsewhere=elsewhere)
        devices = need.devices
        if took is not None and machine.gpus and node.stage.sharded and need.servers is None:
            devices, took = options.shards, took / options.shards
        if node.name not in needs and took is None:  # it takes seconds
            continue
        disk, temporary = disk + need.disk, max(temporary, need.temporary_disk)
        parts = [f"disk {format_bytes(need.disk)}"] if need.disk else []
        if took is None:
            unknown.append(node.name)
        else:
            seconds, hours = seconds + took, hours + took * devices / 3600
        parts.append("time not measured" if took is None else f"time {format_duration(took)} {how}")
        if took is not None and (cost := _cost(took * devices / 3600, price, machine)):
            parts.append(cost)
        _compare(findings, node, need, ", ".join(parts), machine, elsewhere=elsewhere)
        if need.steps > 1 and machine.rates is not None:
            findings.ok(f"{node.name}: a step", describe(need.on_gpu, machine.rates))
    if to_make:
        _compare_disk(findings, disk + temporary, home)
        left_out = f"; not measured: {', '.join(unknown)}" if unknown else ""
        cost = _cost(hours, price, machine)
        findings.ok("time", f"about {format_duration(seconds)}{f', {cost}' if cost else ''}{left_out}")


def model_sizes(nodes: Sequence[Node], artifact: Path, plans: DrafterPlans, machine: Hardware) -> Sizes | None:
    """Return the sizes of the target and of a run's largest drafter; None if that is not known.

    artifact: the target's. Nodes that end before the first drafter need none: it counts as empty.
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


def _needs(nodes: Sequence[Node], sizes: Sizes) -> dict[str, Need]:
    """Return the need of each node whose stage has an estimate. nodes: in topological order."""
    needs: dict[str, Need] = {}
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        if (estimate := NEEDS.get(node.stage.name)) is None:
            continue
        prompts = by_name[node.inputs["prompts"]].config if "prompts" in node.inputs else None
        counts: dict[str, int] = {}
        if isinstance(prompts, PromptsConfig):
            counts = {split: prompts.prompt_count(split) for split in SPLITS}
        source = needs.get(node.inputs.get("trajectories", ""))
        drafters = sum(is_drafter(name) for name in node.inputs)
        needs[node.name] = estimate(node.config, StageUse(sizes, counts, drafters, source.makes if source else None))
    return needs


def _compare(findings: Findings, node: Node, need: Need, rest: str, machine: Hardware, *, elsewhere: bool) -> None:
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
    each = " each" if need.processes > 1 else ""
    parts = [
        f"{what} {format_bytes(needed)}{each}" + ("" if elsewhere else f" of {format_bytes(has)}")
        for what, (needed, has) in sizes.items()
    ]
    text = ", ".join([*parts, rest])
    if fullest > _TOO_MUCH and not elsewhere:
        findings.error(check, f"{text}: too much. {advice.capitalize()}.")
    elif fullest > _TIGHT and not elsewhere:
        findings.warn(check, f"{text}: tight. {advice.capitalize()}.")
    else:
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


def _cost(hours: float, price: float | None, machine: Hardware) -> str:
    """Return the hours of GPUs, or of a machine without any, and their price."""
    if not machine.gpus and price is None:
        return ""
    unit = "GPU hours" if machine.gpus else "hours of this machine"
    shown = f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"
    return f"{shown} {unit}" + (f" for {hours * price:.2f}" if price is not None else "")


def _time(
    node: Node, need: Need, history: _History, sizes: Sizes, machine: Hardware, *, elsewhere: bool
) -> tuple[float | None, str]:
    """Return the seconds that a node takes, None if unknown, and where they come from."""
    if (last := history.last(node)) is not None:
        steps = last.metrics.get("seconds", last.duration_s)  # of a training's steps, earlier attempts included
        return max(0.0, last.duration_s - steps) + steps * _work_ratio(node, need, last), "by its last run"
    if machine.rates is not None and need.on_gpu:
        seconds = need.steps * sum(map(machine.rates.seconds, need.on_gpu.values()))
        return seconds + need.server_starts * _SERVER_START_S, f"by arithmetic for {machine.rates.name}"
    kind, work = need.work or ("", 0.0)
    rate = next((each for each in MEASURED_RATES if each.device in machine.device and each.work == kind), None)
    if rate is None or elsewhere:
        return None, ""
    seconds = work / rate.a_second * sizes.target.parameters / rate.parameters
    unit = "block positions" if kind == "train" else "tokens"
    return seconds, f"by {rate.a_second:,.0f} {unit}/s ({rate.where})"


class _History:
    """The artifacts of the store, oldest first."""

    def __init__(self, made: Sequence[Manifest], nodes: Sequence[Node]):
        self._made, self._nodes = made, {node.name: node for node in nodes}
        self._configs = {(each.stage, each.key): each.config for each in made}

    def last(self, node: Node) -> Manifest | None:
        """Return the last artifact of the node's stage with the same input names, target and kind of drafter."""
        target = self._nodes.get(node.inputs.get("target", ""), node).config.model_dump(mode="json")
        alike = _inputs(node.inputs), _model(target), _drafter(node.config.model_dump(mode="json"))
        for each in reversed(self._made):
            source = each.inputs.get("target")
            model = each.config if source is None else self._configs.get((source.stage, source.key), {})
            like = _inputs(each.inputs), _model(model), _drafter(each.config)
            if each.stage == node.stage.name and each.duration_s > 0 and like == alike:
                return each
        return None


def _inputs(inputs: Iterable[str]) -> set[str]:
    return {name.partition(":")[0] for name in inputs}


def _model(target: Mapping[str, object]) -> tuple[object, ...]:
    return target.get("source"), target.get("dtype")


def _drafter(config: Mapping[str, Any]) -> Any:
    return config["drafter"].get("kind") if isinstance(config.get("drafter"), dict) else None


def _work_ratio(node: Node, need: Need, last: Manifest) -> float:
    """Return the node's work as a multiple of its last run's; 1 if unknown."""
    try:
        if node.stage.name == "rollout" and need.makes is not None:
            return need.makes.count / last.metrics["answers"] or 1.0
        return _blocks(node.config.model_dump()) / _blocks(last.config) or 1.0
    except (KeyError, ZeroDivisionError):  # not a training, or one of another release
        return 1.0


def _blocks(config: Mapping[str, Any]) -> float:
    """Return the number of blocks that each process of a training reads."""
    parallel = config.get("parallel") or {}
    world = parallel.get("processes", 1) * parallel.get("nodes", 1)
    return float(config["steps"] * config["sequences_per_step"] * config["anchors_per_sequence"] / world)
