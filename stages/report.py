"""The report stage: what mining, the trainings and evaluation found, on one page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.manifest import MANIFEST, InputEntry, Manifest, read_manifest
from draftsmith.stages.contract import Config, Operational, Stage, StageContext
from draftsmith.stages.reporting.page import ReportData, render_report
from draftsmith.stages.reporting.verdict import findings

TRAININGS = ("sft", "opd", "control")
HEADLINE = ("tau", "tau_low", "tau_high", "differences")


class ReportConfig(Config):
    title: str = Field(default="Draft model refresh", min_length=1, description="Heading of the page.")
    rejected_rows: int = Field(default=20, ge=0, description="Rows of the table of most rejected tokens.")
    history: Annotated[tuple[dict[str, Any], ...], Operational()] = Field(
        default=(), description="filled in when the plan is made: what the line's champions were worth, and when"
    )


def run(ctx: StageContext, config: ReportConfig) -> None:
    """Write `report.html`, and `headline.json` with the figures in it that do not depend on time."""
    evaluation = _read_json(ctx.inputs["evaluation"] / "evaluation.json")
    lineage = list(_lineage(ctx))
    data = ReportData(
        title=config.title,
        evaluation=evaluation,
        decision=_read_json(ctx.inputs["gate"] / "decision.json") if "gate" in ctx.inputs else {},
        history=[*config.history, *_drift(ctx.inputs.get("drift"))],
        mining=_read_json(ctx.inputs["mining"] / "summary.json"),
        curves={arm: _losses(ctx.inputs[arm] / "metrics.jsonl") for arm in TRAININGS if arm in ctx.inputs},
        lineage=[{"name": name} | manifest.model_dump() for name, manifest in lineage],
        config={f"{name} ({manifest.stage}/{manifest.key[:8]})": manifest.config for name, manifest in lineage},
        rejected_rows=config.rejected_rows,
    )
    render_report(ctx.out / "report.html", data)
    drafters = evaluation.get("drafters", {})
    headline = {arm: {name: figures[name] for name in HEADLINE if name in figures} for arm, figures in drafters.items()}
    write_text(ctx.out / "headline.json", json.dumps(headline, indent=2, sort_keys=True) + "\n")
    for sentence in findings(evaluation):
        ctx.log(sentence)
    ctx.summary(**{f"tau_{arm}": figures["tau"] for arm, figures in drafters.items() if figures.get("tau") is not None})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DraftsmithError(f"{path}: missing; run its stage again") from None
    except ValueError as error:
        raise DraftsmithError(f"{path}: not JSON ({error}); run its stage again with --force") from error
    if not isinstance(content, dict):
        raise DraftsmithError(f"{path}: expected an object; run its stage again with --force")
    return content


def _drift(folder: Path | None) -> list[dict[str, Any]]:
    """What this refresh's own drift check saw, if there was one."""
    if folder is None or not (folder / MANIFEST).is_file():
        return []
    return [{"at": read_manifest(folder).created_at, "what": "checked", **_read_json(folder / "drift.json")["all"]}]


def _losses(path: Path) -> list[tuple[int, float]]:
    """(step, loss) of a training's metrics; a training without them has no curve."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [(row["step"], row["loss"]) for row in rows if isinstance(row.get("loss"), int | float)]


def _lineage(ctx: StageContext) -> Iterator[tuple[str, Manifest]]:
    """Every artifact behind the inputs, sources first, under the name that this stage or its reader gives it."""
    roots = {name: folder for name, folder in ctx.inputs.items() if (folder / MANIFEST).is_file()}
    names = {read_manifest(folder).key: name for name, folder in roots.items()}
    seen: set[str] = set()

    def visit(name: str, folder: Path) -> Iterator[tuple[str, Manifest]]:
        manifest = read_manifest(folder)
        if manifest.key not in seen:
            seen.add(manifest.key)
            for source, entry in manifest.inputs.items():
                if (_sibling(folder, entry) / MANIFEST).is_file():  # it may have been removed since
                    yield from visit(source, _sibling(folder, entry))
            yield names.get(manifest.key, name), manifest

    for name, folder in roots.items():
        yield from visit(name, folder)


def _sibling(folder: Path, entry: InputEntry) -> Path:
    return folder.parent.parent / entry.stage / entry.key[:16]


STAGE = Stage(
    name="report",
    config=ReportConfig,
    inputs=("mining", "evaluation", "sft", "opd", "control?", "gate?", "drift?"),
    run=run,
    volatile=("metrics.jsonl", "report.html"),  # it shows durations and tokens/s
)
