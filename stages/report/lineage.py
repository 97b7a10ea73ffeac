"""The artifacts that a report rests on, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.artifacts.results.evaluation import CHAMPION
from draftsmith.artifacts.store.manifest import MANIFEST, InputEntry, Manifest, read_manifest
from draftsmith.stages.report.stage import ReportConfig

_TRAJECTORIES = "trajectories"  # the input of stages that read answers, which several nodes make
_ANSWERS_OF = {"evaluation": "heldout", "drift": "heldout", "sft": "rollout"}  # reader -> node; else `assisted`
_PRODUCTION = ("logs",)  # stages whose answers production generated


@dataclass(frozen=True)
class LineageEntry:
    """An artifact under the name of its node."""

    name: str
    manifest: Manifest
    folder: Path = Path()

    @property
    def key(self) -> str:
        """Return the artifact as it is named in the store."""
        return f"{self.manifest.stage}/{self.manifest.key[:16]}"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return the config by which two refreshes are compared: a champion is its version."""
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
        return int(servers * launch.get("tensor_parallel", 1) * launch.get("data_parallel", 1))

    def count(self, metric: str) -> float | None:
        """Return what the stage generated or trained (`response_tokens`, `positions` or `tflop`).

        None if it reports nothing, and for tokens that production generated.
        """
        if metric == "response_tokens" and self.manifest.stage in _PRODUCTION:
            return None
        return self.manifest.metrics.get(metric)


def device_seconds(lineage: Sequence[LineageEntry]) -> float:
    """Return wall time times devices."""
    return sum(entry.manifest.duration_s * entry.devices for entry in lineage)


def wall_seconds(lineage: Sequence[LineageEntry]) -> float:
    """Return the wall time of all stages, reused ones included."""
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
            own = names.get(manifest.key, CHAMPION if manifest.stage == CHAMPION else name)
            for source, entry in manifest.inputs.items():
                if (_sibling(folder, entry) / MANIFEST).is_file():  # it may have been removed since
                    node = _answer_node(own, entry.stage) if source == _TRAJECTORIES else source
                    yield from visit(node, _sibling(folder, entry))
            yield LineageEntry(own, _with_line(manifest, config), folder)

    for name, folder in roots.items():
        yield from visit(name, folder)


def _with_line(manifest: Manifest, config: ReportConfig) -> Manifest:
    """Return a champion's manifest with the line of this report: the artifact names the line that made it first."""
    if manifest.stage != CHAMPION or config.champion is None:
        return manifest
    line, version = config.champion
    return manifest.model_copy(update={"config": {**manifest.config, "line": line, "version": version}})


def _answer_node(reader: str, stage: str) -> str:
    """Return the node that made the answers which a node reads. stage: of these answers."""
    return _ANSWERS_OF.get(reader, "assisted") if stage == "rollout" else stage


def _sibling(folder: Path, entry: InputEntry) -> Path:
    return folder.parent.parent / entry.stage / entry.key[:16]
