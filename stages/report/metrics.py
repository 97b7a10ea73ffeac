"""Every metric of a report under one name, for searches in MLflow; the artifacts behind it, and their cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.artifacts.results.base import Record
from draftsmith.artifacts.results.evaluation import (
    CHAMPION,
    PLAIN,
    Acceptance,
    EvaluationResult,
    LoadPoint,
    SpeedTable,
    setting_name,
)
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.artifacts.store.manifest import MANIFEST, InputEntry, Manifest, read_manifest
from draftsmith.stages.evaluation.verdicts import estimate_of, load_factor
from draftsmith.stages.report.stage import ReportConfig

_TRAJECTORIES = "trajectories"  # input of stages that read answers; several nodes make answers
_ANSWERS_OF = {"evaluation": "heldout", "drift": "heldout", "sft": "rollout"}  # reader -> node; else `assisted`


@dataclass(frozen=True)
class LineageEntry:
    """An artifact under the name of its node."""

    name: str
    manifest: Manifest
    folder: Path = Path()

    @property
    def key(self) -> str:
        """Return the artifact's name in the store."""
        return f"{self.manifest.stage}/{self.manifest.key[:16]}"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return the config for comparing two refreshes: a champion is its version."""
        config = self.manifest.config
        return {n: config.get(n) for n in ("line", "version")} if self.manifest.stage == CHAMPION else config

    @property
    def devices(self) -> int:
        """Return the number of devices that the stage's config asks for."""
        config = self.manifest.config
        parallel = config.get("parallel") or {}
        if parallel:
            return int(parallel.get("processes", 1) * parallel.get("nodes", 1))
        launch = (config.get("engine") or {}).get("launch") or {}
        servers = 1 if "rounds" in config else launch.get("servers", 1)  # an evaluation runs one at a time
        return int(servers * launch.get("tensor_parallel", 1))

    def count(self, metric: str) -> float | None:
        """Return the stage's count of work: `response_tokens`, `positions` or `tflop`.

        None if it reports nothing, and for tokens that production generated.
        """
        if metric == "response_tokens" and self.manifest.stage == "logs":
            return None
        return self.manifest.metrics.get(metric)


def device_seconds(lineage: Sequence[LineageEntry]) -> float:
    """Return wall time times devices."""
    return sum(entry.manifest.duration_s * entry.devices for entry in lineage)


def wall_seconds(lineage: Sequence[LineageEntry]) -> float:
    """Return the wall time of all stages, with reused ones."""
    return sum(entry.manifest.duration_s for entry in lineage)


def read_lineage(inputs: Mapping[str, Path], config: ReportConfig) -> Iterator[LineageEntry]:
    """Yield every artifact that the inputs were made from, sources first, under the name that its reader gives it."""
    roots = {name: folder for name, folder in inputs.items() if (folder / MANIFEST).is_file()}
    names = {read_manifest(folder).key: name for name, folder in roots.items()}  # as the report names its inputs
    seen: set[str] = set()

    def visit(name: str, folder: Path) -> Iterator[LineageEntry]:
        manifest = read_manifest(folder)
        if manifest.key not in seen:
            seen.add(manifest.key)
            label = names.get(manifest.key, CHAMPION if manifest.stage == CHAMPION else name)
            for source, entry in manifest.inputs.items():
                if (_sibling(folder, entry) / MANIFEST).is_file():  # it may have been removed since
                    node = _answer_node(label, entry.stage) if source == _TRAJECTORIES else source
                    yield from visit(node, _sibling(folder, entry))
            yield LineageEntry(label, _with_line(manifest, config), folder)

    for name, folder in roots.items():
        yield from visit(name, folder)


def _with_line(manifest: Manifest, config: ReportConfig) -> Manifest:
    """Return a champion's manifest with the line of this report: the artifact names the line that made it first."""
    if manifest.stage != CHAMPION or config.champion is None:
        return manifest
    line, version = config.champion
    return manifest.model_copy(update={"config": {**manifest.config, "line": line, "version": version}})


def _answer_node(reader: str, stage: str) -> str:
    """Return the node that made the answers which a node reads. stage: the stage of these answers."""
    return _ANSWERS_OF.get(reader, "assisted") if stage == "rollout" else stage


def _sibling(folder: Path, entry: InputEntry) -> Path:
    return folder.parent.parent / entry.stage / entry.key[:16]


CHALLENGER = "challenger"
_SPEED = (
    "speedup", "tokens_per_s", "tau_served", "draft_share", "verify_share", "draft_ms_per_step", "verify_ms_per_step",
    "identical_share", "request_tokens_per_s_median", "first_token_s_median", "first_token_s_p95",
)  # fmt: skip
Named = Iterator[tuple[str, object]]


def report_metrics(
    evaluation: EvaluationResult,
    decision: GateDecision | None = None,
    lineage: Sequence[LineageEntry] = (),
    data: Mapping[str, Record | None] | None = None,
) -> dict[str, float]:
    """Return the metrics by name; missing and non-finite ones are skipped.

    `tau.ARM`, `tau.ARM/SLICE`, `speedup.cCONCURRENCY.tTEMPERATURE` (the challenger's), `speedup.ARM.c….t…`,
    `speedup.ARM/SLICE` (at the first setting), `tau_gain` and `tau_gain/SLICE` (share of the champion's), all with
    `.low` and `.high`; `load.speedup.cCONCURRENCY`, `load.speed_over_champion.…`, `load.tokens_per_s.…` and
    `load.block_size.…` (the challenger's, predicted or measured); `accepted_share.ARM.OFFSET`,
    `accepted_share.challenger/SLICE.OFFSET`, `accepted_length.ARM.LENGTH` (verify steps), `confidence.ARM.FIELD` (of
    `ConfidenceCalibration`), `gate.RULE` (1: passed, 0: broken; absent where inconclusive) with `.value`, `.end` and
    `.wanted`, `rules_broken`, `rules_unjudged` (inconclusive), `cost.…`, `data.…`. ARM is also `challenger`, the arm
    that the gate looked at.

    data: the summaries of stages `prompts` and `logs`.
    """
    metrics: dict[str, object] = dict(_evaluation_metrics(evaluation))
    metrics |= dict(_cost_metrics(lineage))
    for name, summary in (data or {}).items():
        metrics |= dict(_flatten(f"data.{name}", None if summary is None else summary.to_json()))
    if decision is not None:
        metrics |= dict(_gate_metrics(decision))
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _gate_metrics(decision: GateDecision) -> Named:
    if decision.rules:
        yield "rules_broken", sum(rule.broken for rule in decision.rules)
        yield "rules_unjudged", sum(not rule.conclusive for rule in decision.rules)
    for rule in decision.rules:
        name = rule.name.replace(",", "")  # MLflow refuses commas
        if rule.conclusive:
            yield f"gate.{name}", float(rule.passed)
        for metric, value in rule.metrics.items():
            yield f"gate.{name}.{metric}", value


def _evaluation_metrics(evaluation: EvaluationResult) -> Named:
    if evaluation.drafters:
        challenger = evaluation.challenger
        for arm, drafter in evaluation.drafters.items():
            for role in (arm, *((CHALLENGER,) if arm == challenger else ())):
                yield from _drafter_metrics(role, drafter)
                yield from _set_metrics(role, arm, evaluation)
        for name, arms in evaluation.acceptance_by_offset.items():
            for offset, share in enumerate(arms.get(challenger, ()), start=1):
                yield f"accepted_share.{CHALLENGER}/{name}.{offset}", share
        yield from _champion_metrics(evaluation, challenger)
        for table in evaluation.speed_by_setting:
            yield from _speed_metrics(table, challenger)
        for point in evaluation.load:
            if point.arm == challenger:
                yield from _load_metrics(point)
    yield "speed_warnings", len(evaluation.speed_warnings)
    for name in ("fp32_prompts", "fp32_identical", "identical_share", "median_margin"):
        yield f"exactness.{name}", getattr(evaluation.exactness, name)
    yield "loop_share", evaluation.loop_share
    for arm, parity in (evaluation.parity or {}).items():
        yield from _flatten(f"parity.{arm}", parity.to_json())


def _cost_metrics(lineage: Sequence[LineageEntry]) -> Named:
    yield "cost.wall_s", wall_seconds(lineage)
    yield "cost.device_s", device_seconds(lineage)
    for entry in lineage:
        yield f"cost.wall_s.{entry.name}", entry.manifest.duration_s
    for name, metric in (("tokens", "response_tokens"), ("positions", "positions"), ("tflop", "tflop")):
        yield f"cost.{name}", sum(entry.count(metric) or 0.0 for entry in lineage)


def _flatten(name: str, value: object) -> Named:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(f"{name}.{key}", inner)
    else:
        yield name, value


def _with_ends(name: str, numbers: Iterable[float | None]) -> Named:
    """Yield a value and the ends of its interval."""
    return zip((name, f"{name}.low", f"{name}.high"), numbers, strict=True)


def _drafter_metrics(role: str, drafter: Acceptance) -> Named:
    yield from _with_ends(f"tau.{role}", (drafter.tau, drafter.tau_low, drafter.tau_high))
    yield f"block_size.{role}", drafter.block_size
    for offset, share in enumerate(drafter.acceptance_by_offset, start=1):
        yield f"accepted_share.{role}.{offset}", share
    for other, difference in drafter.differences.items():
        yield from _with_ends(f"tau_minus.{other}.{role}", (difference.value, difference.low, difference.high))
    for length, steps in enumerate(drafter.accepted_histogram):
        yield f"accepted_length.{role}.{length}", steps
    yield f"tau_without_loops.{role}", drafter.tau_without_loops
    if drafter.confidence is not None:
        yield from _flatten(f"confidence.{role}", drafter.confidence.to_json())


def _set_metrics(role: str, arm: str, evaluation: EvaluationResult) -> Named:
    for name, arms in evaluation.sets.items():
        if (measured := arms.get(arm)) is not None:
            yield from _with_ends(f"tau.{role}/{name}", (measured.tau, measured.low, measured.high))
            yield from _with_ends(
                f"speedup.{role}/{name}", (measured.speedup, measured.speedup_low, measured.speedup_high)
            )


def _champion_metrics(evaluation: EvaluationResult, challenger: str) -> Named:
    """Yield the challenger's gain of tau and speed over the champion, with their intervals."""
    for verdict in evaluation.compared("tau", challenger, CHAMPION):
        if verdict.gain is not None and verdict.base:
            gain = estimate_of(verdict.gain)
            name = "tau_gain" if verdict.set is None else f"tau_gain/{verdict.set}"
            yield from _with_ends(name, (gain.value, *(gain.interval() or (None, None))))
    for verdict in evaluation.compared("speed", challenger, CHAMPION):
        ends = map(math.exp, estimate_of(verdict).interval() or (math.nan, math.nan))
        name = f"speed_over_champion.{setting_name(verdict.temperature, verdict.concurrency)}"
        yield from _with_ends(name, (math.exp(verdict.value), *ends))


def _load_metrics(point: LoadPoint) -> Named:
    where = f"c{point.concurrency}"
    name = "speedup" if point.other == PLAIN else "speed_over_champion"
    yield from _with_ends(f"load.{name}.{where}", load_factor(point))
    yield f"load.tokens_per_s.{where}", point.tokens_per_s
    yield f"load.block_size.{where}", point.block_size


def _speed_metrics(table: SpeedTable, challenger: str) -> Named:
    for arm, metrics in table.arms.items():
        for name in _SPEED:
            for end in ("", "_low", "_high") if name == "speedup" else ("",):
                value, suffix = getattr(metrics, f"{name}{end}"), end.replace("_", ".")
                yield f"{name}.{arm}.{table.name}{suffix}", value
                if arm == challenger:
                    yield f"{name}.{table.name}{suffix}", value
