"""The report stage: what mining, the trainings and evaluation found, on one page."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.manifest import MANIFEST, InputEntry, Manifest, read_manifest
from draftsmith.stages.evaluation.gate_rules import CHAMPION, challenger_of, with_version
from draftsmith.stages.report.metrics import figures as figures_of
from draftsmith.stages.report.names import target_name
from draftsmith.stages.report.next_steps import COMMAND, invocation, next_steps
from draftsmith.stages.report.page import ReportData, render_report
from draftsmith.stages.report.review import machine, review_of
from draftsmith.stages.runtime.stage import Config, FilledIn, NotInKey, Stage, StageContext

ANSWERS = "trajectories"  # the input of stages that read answers: several nodes make some
_ANSWERS_OF = {"evaluation": "heldout", "drift": "heldout", "sft": "rollout"}  # node that makes them; else `assisted`
REVIEW = "review.json"
HEADLINE = ("tau", "tau_low", "tau_high", "differences")


class ReportConfig(Config):
    champion: Annotated[
        tuple[str, int] | None,
        FilledIn(),
        Field(description="line and version of the drafter that serves"),
    ] = None
    line: Annotated[str | None, FilledIn(), NotInKey(), Field(description="the line of drafters")] = None
    history: Annotated[
        tuple[dict[str, Any], ...],
        FilledIn(),
        NotInKey(),
        Field(description="what the line's drafters were worth, and when"),
    ] = ()


def run(ctx: StageContext, config: ReportConfig) -> None:
    """Write `report.html`, `headline.json` with the figures in it that do not depend on time, and `review.json` with
    the typed review, all figures and the configs: what MLflow shows."""
    evaluation = _read_json(ctx.inputs["evaluation"] / "evaluation.json")
    decision = _read_json(ctx.inputs["gate"] / "decision.json") if "gate" in ctx.inputs else {}
    if config.champion is not None:
        decision = with_version(decision, config.champion[1])
    lineage = [(name, _of_its_line(manifest, config), folder) for name, manifest, folder in _lineage(ctx)]
    artifacts = [{"name": name} | manifest.model_dump() for name, manifest, _ in lineage]
    made = {manifest.stage: (manifest, folder) for _, manifest, folder in lineage}
    prompts, logs = _figures(made, "prompts", "prompts.json"), _figures(made, "logs", "logs.json")
    review = review_of(evaluation, decision)
    target = target_name(str(made["target"][0].config.get("source", ""))) if "target" in made else ""
    asked = invocation(os.environ.get(COMMAND), config.line)
    seconds = {name: manifest.duration_s for name, manifest, _ in lineage}
    data = ReportData(
        title=" · ".join(filter(None, ["Draft model refresh", target, _line(config)])),
        evaluation=evaluation,
        decision=decision,
        facts=_facts(evaluation, artifacts, logs),
        steps=next_steps(review, asked, seconds) if review is not None else (),
        history=[
            *config.history,
            *_drift(ctx.inputs.get("drift")),
            *_now(ctx, evaluation, decision),
        ],
        contexts=_contexts(ctx.inputs["evaluation"] / "contexts.json", evaluation),
        prompts=prompts,
        logs=logs,
        lineage=artifacts,
        config={f"{name} ({manifest.stage}/{manifest.key[:8]})": manifest.config for name, manifest, _ in lineage},
    )
    render_report(ctx.out / "report.html", data)
    drafters = evaluation.get("drafters", {})
    headline = {arm: {name: figures[name] for name in HEADLINE if name in figures} for arm, figures in drafters.items()}
    write_text(ctx.out / "headline.json", json.dumps(headline, indent=2, sort_keys=True) + "\n")
    kept: dict[str, Any] = {"outcome": None, "doubts": []} if review is None else asdict(review)
    if review is not None:
        kept["outcome"]["label"] = review.outcome.label
        ctx.log(f"{review.outcome.label}. {review.outcome.sentence}")
    kept |= {
        "figures": figures_of(evaluation, decision, artifacts, {"prompts": prompts, "logs": logs}),
        "config": {name: _compared(manifest) for name, manifest, _ in lineage},
        "artifacts": {name: f"{manifest.stage}/{manifest.key[:16]}" for name, manifest, _ in lineage},
    }
    write_text(ctx.out / REVIEW, json.dumps(kept, indent=1, sort_keys=True, default=str) + "\n")
    ctx.summary(**{f"tau_{arm}": figures["tau"] for arm, figures in drafters.items() if figures.get("tau") is not None})


def _line(config: ReportConfig) -> str:
    if config.line is None:
        return ""
    beside = f"against version {config.champion[1]}" if config.champion is not None else "no champion yet"
    return f"line {config.line}, {beside}"


def _facts(
    evaluation: Mapping[str, Any], artifacts: Sequence[Mapping[str, Any]], logs: Mapping[str, Any]
) -> dict[str, str]:
    """Of when, where, by whom and from what the figures are."""
    made = [str(each["created_at"]) for each in artifacts if each.get("created_at")]
    window = logs.get("window") or {}
    since = window.get("since") or window.get("after")
    ends = [f"from {since}" if since else "", f"to {window['newest']}" if window.get("newest") else ""]
    return {
        "data": " ".join(filter(None, ends)),
        "measured": f"{max(made)[:16].replace('T', ' ')} UTC" if made else "",
        "on": machine(evaluation),
        "engine": str(evaluation.get("engine") or ""),
        "commit": _commit(),
        "run by": _user(),
    }


def _commit() -> str:
    """Of the folder that the run was started in."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""


def _of_its_line(manifest: Manifest, config: ReportConfig) -> Manifest:
    """A champion's artifact is of its content: it names the line that made it first."""
    if manifest.stage != CHAMPION or config.champion is None:
        return manifest
    line, version = config.champion
    return manifest.model_copy(update={"config": {**manifest.config, "line": line, "version": version}})


def _compared(manifest: Manifest) -> dict[str, Any]:
    """The config of an artifact as two refreshes are compared by it: a champion is its version."""
    config = manifest.config
    return {name: config.get(name) for name in ("line", "version")} if manifest.stage == CHAMPION else config


def _figures(made: Mapping[str, tuple[Manifest, Path]], stage: str, file: str) -> dict[str, Any]:
    """Return what a stage wrote of its data, from the store's bucket if it was made on another host; empty if the
    report does not rest on it."""
    if stage not in made:
        return {}
    manifest, folder = made[stage]
    if not (folder / file).is_file() and file in manifest.files:
        from draftsmith.artifacts.home import home
        from draftsmith.artifacts.store.mirror import open_store

        open_store(home()).fetch(manifest.ref(folder), [file])
    return _read_json(folder / file) if (folder / file).is_file() else {}


def _contexts(path: Path, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the arm that the gate looks at."""
    if not path.is_file() or not evaluation.get("drafters"):
        return []
    return list(_read_json(path).get(challenger_of(evaluation), ()))


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


def _now(ctx: StageContext, evaluation: Mapping[str, Any], decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What this refresh's challenger is worth, in the history of its line."""
    folder = ctx.inputs["evaluation"]
    if not decision or not (folder / MANIFEST).is_file():
        return []
    drafter = evaluation["drafters"][decision["challenger"]]
    figures = {"tau": drafter["tau"], "low": drafter["tau_low"], "high": drafter["tau_high"]}
    return [{"at": read_manifest(folder).created_at, "what": "now", **figures}]


def _lineage(ctx: StageContext) -> Iterator[tuple[str, Manifest, Path]]:
    """Every artifact behind the inputs, sources first, under the name that this stage or its reader gives it."""
    roots = {name: folder for name, folder in ctx.inputs.items() if (folder / MANIFEST).is_file()}
    names = {read_manifest(folder).key: name for name, folder in roots.items()}  # as this stage calls its inputs
    seen: set[str] = set()

    def visit(name: str, folder: Path) -> Iterator[tuple[str, Manifest, Path]]:
        manifest = read_manifest(folder)
        if manifest.key not in seen:
            seen.add(manifest.key)
            own = names.get(manifest.key, CHAMPION if manifest.stage == CHAMPION else name)
            for source, entry in manifest.inputs.items():
                if (_sibling(folder, entry) / MANIFEST).is_file():  # it may have been removed since
                    name_there = _answers(own, entry.stage) if source == ANSWERS else source
                    yield from visit(name_there, _sibling(folder, entry))
            yield own, manifest, folder

    for name, folder in roots.items():
        yield from visit(name, folder)


def _answers(reader: str, stage: str) -> str:
    """Return the node that made the answers which a node reads. stage: of these answers."""
    return _ANSWERS_OF.get(reader, "assisted") if stage == "rollout" else stage


def _sibling(folder: Path, entry: InputEntry) -> Path:
    return folder.parent.parent / entry.stage / entry.key[:16]


STAGE = Stage(
    name="report",
    config=ReportConfig,
    inputs=("mining", "evaluation", "sft", "opd", "control?", "gate?", "drift?"),
    body=__name__,
    volatile=("metrics.jsonl", "report.html", REVIEW),  # they show durations and tokens/s
    reads_volatile=("evaluation", "gate"),
)
