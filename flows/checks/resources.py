"""Memory and disk that the run is estimated to need, compared with what the machine has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from draftsmith.artifacts.machine_memory import memory_bytes
from draftsmith.flows.checks.engines import runs_elsewhere
from draftsmith.flows.checks.estimates import Parts, disk, estimates, gigabytes
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.checks.models import Plans
from draftsmith.flows.pipeline.graph import Node
from draftsmith.flows.pipeline.machine import free_disk_bytes, gpu_names, gpus
from draftsmith.stages.checkpoints import GENERATIONS
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.prompts import PromptsConfig
from draftsmith.stages.targets.estimate import DTYPE_BYTES, PROCESS, Estimate, ModelSize, Servers, Sizes, target_size
from draftsmith.stages.targets.info import model_path, read_target_info

_TIGHT, _TOO_MUCH = 0.85, 1.35  # of what is there: estimates are meant to be right within a third
_SGLANG_FRACTION = 0.85  # of a GPU's memory that SGLang takes by itself, about
# Loaded into the host's memory before they go to a GPU: weights, and of 16 or 18 bytes a trained parameter the 12 that
# a checkpoint holds.
_THROUGH_HOST = {"target": 1.0, "drafter": 1.0, "drafter with AdamW": 12 / 16}


def check_accelerators(found: Findings) -> None:
    """Whether torch computes on the GPUs that this machine has."""
    if not (names := gpu_names()):
        return
    import torch

    if not torch.cuda.is_available():
        found.warn(
            "GPUs",
            f"{', '.join(names)}: torch {torch.__version__} can use none, so stages compute on the CPU: install a "
            "build for CUDA, or a newer driver; CUDA_VISIBLE_DEVICES= (empty) says that this is wanted",
        )


def check_resources(
    found: Findings, nodes: Sequence[Node], artifact: Path, plans: Plans, home: Path
) -> dict[str, Estimate]:
    """One line a node, and one for the disk. artifact: of the target; plans: of the drafters that are trained anew.
    Returns what each node needs, as far as it is known."""
    prompts = next((node.config for node in nodes if isinstance(node.config, PromptsConfig)), None)
    plan = max(plans.values(), key=lambda plan: plan.parameters, default=None)
    if prompts is None or plan is None:
        found.skip("memory", "not estimated, disk neither: the drafter's shape is not known here")
        return {}
    info = read_target_info(artifact)
    sizes = Sizes(
        target=target_size(model_path(artifact)),
        drafter=ModelSize.of(plan.config, plan.parameters),
        features=len(plan.target_layer_ids),
        block_size=plan.block_size,
        itemsize=DTYPE_BYTES[info.dtype],
        longest_prompt=prompts.max_prompt_tokens,
        positions=info.max_positions,
        kind=plan.kind,
        device_memory=float(min(gpus(), default=memory_bytes())),
        accelerated=bool(gpus()),
    )
    elsewhere = runs_elsewhere(nodes)
    needed = estimates(nodes, sizes)
    for node in nodes:
        estimate = needed.get(node.name)
        if estimate is not None:
            _compare_memory(found, node.name, estimate, elsewhere=elsewhere)
        if estimate is not None and estimate.servers is not None:
            _compare_servers(found, estimate.servers, node, elsewhere=elsewhere)
    _compare_disk(found, disk(needed), home)
    return needed


def _compare_memory(found: Findings, node: str, estimate: Estimate, *, elsewhere: bool) -> None:
    """Without a GPU one line. With one a line for its memory and one for the host's. Of one process, and its share."""
    each = "memory" if estimate.processes == 1 else f"memory for each of {estimate.processes} processes"
    host = memory_bytes() / estimate.processes
    if not gpus():
        if estimate.memory or estimate.host:
            parts = Parts({"process": PROCESS, **estimate.host, **estimate.memory})
            _compare(found, f"{node}: memory", parts, host, each, elsewhere=elsewhere)
        return
    if estimate.memory:
        _compare(found, f"{node}: memory", Parts(estimate.memory), gpus()[0], "GPU memory", elsewhere=elsewhere)
    if estimate.host:
        passing = {name: share * estimate.memory.get(name, 0.0) for name, share in _THROUGH_HOST.items()}
        checkpoint = estimate.passing.get("training checkpoint", 0.0) / GENERATIONS
        passing["drafter with AdamW"] = max(passing["drafter with AdamW"], checkpoint)  # also where moments are split
        parts = Parts({"process": PROCESS, **estimate.host, **passing})
        _compare(found, f"{node}: host memory", parts, host, each, elsewhere=elsewhere)


def _compare(found: Findings, check: str, memory: Parts, has: float, what: str, *, elsewhere: bool) -> None:
    text = f"about {memory} ({gigabytes(has)} of {what} here)"
    if memory.total <= _TIGHT * has or elsewhere:
        found.ok(check, f"about {memory}" if elsewhere else text)
    elif memory.total <= _TOO_MUCH * has:
        found.warn(check, f"{text}: tight; {_advice(memory)}")
    else:
        found.error(check, f"{text}: too much; {_advice(memory)}")


def _advice(memory: Parts) -> str:
    """What makes the largest part smaller that can be made smaller."""
    ways = {
        "features": "lower feature_memory_mb or sequences_per_step",
        "activations": "lower micro_batch_tokens or anchors_per_sequence",
        "logits": "lower positions_per_chunk, slots or concurrency, or set head_tokens",
        "key/value memory": "lower slots, concurrency, max_new_tokens, or tokens_per_target_forward",
        "attention mask": "lower max_new_tokens or tokens_per_target_forward",
        "target in float32": "set exactness_prompts to 0",
        "text of a step": "lower rows_per_step or row_tokens",
    }
    largest = max((name for name in memory.parts if name in ways), key=lambda name: memory.parts[name], default=None)
    return ways[largest] if largest else "use a machine with more"


def _compare_servers(found: Findings, servers: Servers, node: Node, *, elsewhere: bool) -> None:
    engine = node.config.engine  # type: ignore[attr-defined]
    assert isinstance(engine, SGLangEngineConfig) and engine.launch is not None
    check, text = f"{node.name}: servers", f"{servers.gpus} times about {Parts(servers.parts)}"
    if elsewhere:
        found.ok(check, text)
        return
    cpu = engine.launch.on_cpu
    has = memory_bytes() / servers.gpus if cpu else min(gpus(), default=0.0)
    usable = has * (1.0 if cpu else engine.launch.memory_fraction or _SGLANG_FRACTION)
    weights = sum(size for name, size in servers.parts.items() if not name.startswith("key/value"))
    text = f"{text} ({gigabytes(usable)} each here)"
    if weights >= usable:
        found.error(check, f"{text}: the weights alone do not fit; raise tensor_parallel or memory_fraction")
    elif servers.needed > usable:
        found.warn(check, f"{text}: not all requests fit at once, SGLang queues them; a lower concurrency is enough")
    else:
        found.ok(check, text)


def _compare_disk(found: Findings, parts: dict[str, float], home: Path) -> None:
    needed, has = sum(parts.values()), free_disk_bytes(home)
    listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in sorted(parts.items(), key=lambda item: -item[1]))
    text = f"at most {gigabytes(needed)} ({listed}); {gigabytes(has)} free at {home}"
    if needed > has:
        found.error("disk", f"{text}: free some space or point DRAFTSMITH_HOME at another disk")
    elif needed > _TIGHT * has:
        found.warn("disk", f"{text}: tight")
    else:
        found.ok("disk", text)
