"""Compares two versions of model lines by what their refreshes stored: `draftsmith diff`, and the same from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.artifacts.home import home
from draftsmith.artifacts.results.data import LogsSummary
from draftsmith.artifacts.results.evaluation import ALL, CHAMPION
from draftsmith.artifacts.results.gate import ReviewResult
from draftsmith.artifacts.tracking.refresh_runs import artifact_folders
from draftsmith.artifacts.tracking.registry import Version
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.execution.display import flatten, shorten
from draftsmith.flows.refresh.versions import registry
from draftsmith.stages.report.review import ABSENT, interval

_FILLED_IN = (CHAMPION, "drift", "earlier", "report")  # nodes whose config a run has looked up, or that need a champion


def version_diff(first: str, second: str) -> tuple[list[str], list[list[str]]]:
    """Return a table, its head and rows of text: gate, data, tau by slice, speed, and the config fields that differ.

    first, second: versions, such as `my-line@1`, `my-line@champion`; a line's name means its champion. Each was
    measured in its own refresh. If the second was compared with the first there, a last column has its gain of tau on
    the same prompts. A refresh whose report is not on this machine has no data window and no config.

    Raises DraftsmithError for an unknown version.
    """
    old, new = (_Side.of(registry().resolve(text)) for text in (first, second))
    gains = new.gains_over(old.version)
    rows = [
        ["gate", old.version.tags.get("outcome", ABSENT), new.version.tags.get("outcome", ABSENT), ""],
        ["why", old.version.tags.get("decision", ABSENT), new.version.tags.get("decision", ABSENT), ""],
        ["data", old.window, new.window, ""],
    ]
    then, now = old.version.metrics(), new.version.metrics()
    for name in dict.fromkeys((ALL, *then, *now)):
        taus = (_interval(metrics.get(name, {}), "tau", "low", "high") for metrics in (then, now))
        rows.append([f"tau{'' if name == ALL else f', {name}'}", *taus, gains.get(name, "")])
    for name in dict.fromkeys((ALL, *then, *now)):
        intervals = ("speedup", "speedup_low", "speedup_high")
        speeds = [_interval(metrics.get(name, {}), *intervals) for metrics in (then, now)]
        if set(speeds) != {ABSENT}:
            rows.append([f"speed-up{'' if name == ALL else f', {name}'}", *speeds, ""])
    for node in dict.fromkeys((*old.config, *new.config)) if old.config and new.config else ():
        if node not in old.config or node not in new.config:
            rows.append([node, *("made" if node in side.config else ABSENT for side in (old, new)), ""])
            continue
        before, after = flatten(old.config[node]), flatten(new.config[node])
        for name in dict.fromkeys((*before, *after)):
            if (values := [fields.get(name, ABSENT) for fields in (before, after)])[0] != values[1]:
                rows.append([f"{node}.{name}", *map(shorten, values), ""])
    head = ["", *(f"{side.version.line}@{side.version.number}" for side in (old, new)), "gain"]
    return (head, rows) if gains else (head[:-1], [row[:-1] for row in rows])


@dataclass(frozen=True)
class _Side:
    """A version with what its refresh reported."""

    version: Version
    window: str  # time window of its data
    config: Mapping[str, Mapping[str, Any]]  # by node
    review: ReviewResult | None

    @classmethod
    def of(cls, version: Version) -> _Side:
        folders = artifact_folders(Tracking(home()), version.run_id, "report") if version.run_id else {}
        review = ReviewResult.read_if_there(Path(folders["report"]) if folders else None)
        logs = LogsSummary.read_if_there(Path(folders["logs"]) if "logs" in folders else None)
        config = review.config if review is not None else {}
        settings = {node: fields for node, fields in config.items() if node not in _FILLED_IN}
        window = logs.window.text if logs is not None else ""
        return cls(version, window or version.created_at[:10], settings, review)

    def gains_over(self, other: Version) -> dict[str, str]:
        """Return the gain of tau by slice, where the other version was the champion of this one's refresh."""
        if self.review is None or self.review.config.get(CHAMPION) != {"line": other.line, "version": other.number}:
            return {}
        metrics, gain = self.review.metrics, "tau_gain"
        names = [name for name in metrics if name.partition("/")[0] == gain and f"{name}.low" in metrics]
        ends = ("", ".low", ".high")
        return {
            name.partition("/")[2] or ALL: _interval(metrics, *(f"{name}{end}" for end in ends), form="+.1%")
            for name in names
        }


def _interval(metrics: Mapping[str, Any], *names: str, form: str = ".2f") -> str:
    return interval((metrics.get(name) for name in names), form).replace("\n", " ")
