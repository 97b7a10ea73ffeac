"""How long a run will take and how much of the GPUs: by what its stages took here before, or by counting operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from draftsmith.artifacts.manifest import Manifest
from draftsmith.artifacts.open_store import store_of
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.pipeline.display import duration
from draftsmith.flows.pipeline.graph import Node
from draftsmith.flows.pipeline.machine import gpu_model, gpus, nominal_tflops
from draftsmith.flows.pipeline.options import StageOptions
from draftsmith.stages.targets.estimate import Estimate

ASSUMED_SHARE = 0.4  # of a data sheet's rate; a published trainer of such drafters reaches 0.44 on eight H200

_BLOCKS = ("steps", "sequences_per_step", "anchors_per_sequence")


def check_duration(
    found: Findings,
    nodes: Sequence[Node],
    to_make: Sequence[Node],
    needed: Mapping[str, Estimate],
    home: Path,
    options: StageOptions,
) -> None:
    """A line for the time of the nodes that are not done, and one for what it costs. needed: by node."""
    history = _History(store_of(home).list(), {node.name: node for node in nodes})
    rate = nominal_tflops(gpu_model() or "") if gpus() else None
    seconds: dict[str, tuple[float, str]] = {}
    for node in to_make:
        estimate = needed.get(node.name, Estimate())
        if (last := history.last(node)) is not None:
            seconds[node.name] = _seconds(last) * _times(node, estimate, last), ""
        elif rate and estimate.operations:
            share = ASSUMED_SHARE * rate * estimate.devices
            seconds[node.name] = estimate.operations / (share * 1e12), f" ({estimate.operations:.1e} operations)"
    unknown = [node.name for node in to_make if node.name not in seconds]
    if not to_make:
        return
    if not seconds:
        found.skip("time", "not estimated: nothing of what is to be made has run here")
        return
    longest_first = sorted(seconds.items(), key=lambda item: -item[1][0])
    parts = ", ".join(f"{name} {duration(value)}{how}" for name, (value, how) in longest_first if value >= 1)
    counted = any(how for _, how in seconds.values())
    assumed = f"; operations at {ASSUMED_SHARE:.0%} of {rate:.0f} TFLOP/s a GPU" if counted else ""
    left_out = f"; not known: {', '.join(unknown)}" if unknown else ""
    total = sum(value for value, _ in seconds.values())
    known = " of what is known" if unknown else ""
    found.ok("time", f"about {duration(total)}{known}{': ' if parts else ''}{parts}{assumed}{left_out}")
    _check_cost(found, {name: value for name, (value, _) in seconds.items()}, needed, options.price_per_hour)


def _check_cost(
    found: Findings, seconds: Mapping[str, float], needed: Mapping[str, Estimate], price: float | None
) -> None:
    """Hours of GPUs, or of this machine where it has none; a stage that holds several counts all of them."""
    if gpus():
        hours = sum(value * _devices(needed.get(name, Estimate())) for name, value in seconds.items()) / 3600
        what = "GPU hours"
    else:
        hours, what = sum(seconds.values()) / 3600, "hours of this machine"
    priced = f", {hours * price:.2f} at {price:g} each (stages.price_per_hour)" if price is not None else ""
    if gpus() or price is not None:
        found.ok("cost", f"about {hours:.2g} {what}{priced}")


def _devices(estimate: Estimate) -> int:
    return estimate.servers.gpus if estimate.servers is not None else estimate.devices


class _History:
    """What was made here, oldest first."""

    def __init__(self, made: Sequence[Manifest], nodes: Mapping[str, Node]):
        self._made, self._nodes = made, nodes
        self._configs = {(each.stage, each.key): each.config for each in made}

    def last(self, node: Node) -> Manifest | None:
        """Of the node's stage, made of the same kinds of inputs, of the same target and for the same kind of drafter,
        where they say; one that took any time."""
        asked = node.config.model_dump(mode="json")
        for each in reversed(self._made):
            if (
                each.stage == node.stage.name
                and each.duration_s > 0
                and _kinds(each.inputs) == _kinds(node.inputs)
                and self._target_of(each) == self._target_for(node)
                and _drafter(each.config) == _drafter(asked)
            ):
                return each
        return None

    def _target_of(self, made: Manifest) -> Any:
        target = made.inputs.get("target")
        return _model(made.config if target is None else self._configs.get((target.stage, target.key), {}))

    def _target_for(self, node: Node) -> Any:
        target = self._nodes.get(node.inputs.get("target", ""), node)
        return _model(target.config.model_dump(mode="json"))


def _kinds(inputs: Iterable[str]) -> set[str]:
    return {name.partition(":")[0] for name in inputs}


def _model(target: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a target's config says of its size and speed; nothing where it is no target's."""
    return target.get("source"), target.get("dtype")


def _drafter(config: Mapping[str, Any]) -> Any:
    return (config.get("drafter") or {}).get("kind") if isinstance(config.get("drafter"), dict) else None


def _seconds(last: Manifest) -> float:
    """That it took, over all attempts where it counted them: the record has those of the one that ended it."""
    return max(last.duration_s, last.metrics.get("seconds", 0.0))


def _times(node: Node, estimate: Estimate, last: Manifest) -> float:
    """How much more the node has to do than the last one of its kind; 1 where nothing says."""
    measures: dict[str, Callable[[], float]] = {
        "rollout": lambda: (estimate.makes.count if estimate.makes else 0.0) / last.metrics["answers"],
        "sft": lambda: _blocks_each(node.config.model_dump()) / _blocks_each(last.config),
        "opd": lambda: _blocks_each(node.config.model_dump()) / _blocks_each(last.config),
    }
    try:
        times = measures.get(node.stage.name, lambda: 1.0)()
    except (KeyError, ZeroDivisionError):  # of another release, or a drafter that was taken over as it is
        return 1.0
    return times if 0 < times < float("inf") else 1.0


def _blocks_each(config: Mapping[str, Any]) -> float:
    """That each of a training's processes has."""
    steps, sequences, anchors = (float(config[name]) for name in _BLOCKS)
    parallel = config.get("parallel") or {}
    return steps * sequences * anchors / (parallel.get("processes", 1) * parallel.get("nodes", 1))
