"""The final screen of a refresh: verdict, table, gate, what to do next, and where everything is."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.manifest import MANIFEST, Manifest, read_manifest
from draftsmith.artifacts.tracking.models import ALL, Metrics
from draftsmith.artifacts.tracking.refresh_runs import OUTCOME
from draftsmith.artifacts.tracking.terms import escape_markdown
from draftsmith.flows.execution.display import Display, EndedRun
from draftsmith.flows.planning.graph import RunReview
from draftsmith.flows.refresh.line import registry
from draftsmith.stages.data.load import DRAFTER_FOLDER
from draftsmith.stages.evaluation.gate import DECISION
from draftsmith.stages.evaluation.gate_rules import with_version
from draftsmith.stages.report.metrics import point_name
from draftsmith.stages.report.names import duration, number, target_name
from draftsmith.stages.report.next_steps import Invocation, Step, next_steps, refresh_anyway
from draftsmith.stages.report.review import Review, review_of
from draftsmith.stages.report.stage import REVIEW
from draftsmith.stages.report.tables import drafters

WIDTH = 80
_VERDICTS = {
    "promoted": "PROMOTED: ",
    "refused": "NOT PROMOTED: refused. ",
    "inconclusive": "NOT PROMOTED: inconclusive. ",
    "measured": "MEASURED: ",
}
_NOTHING_BROKEN = "Nothing is broken: drafters, answers and acceptance lengths are valid and kept."


def show_results(display: Display, made: Mapping[str, Path], ending: EndedRun) -> None:
    """Print the screen. made: node -> folder."""
    display.line("")
    for line in screen(made, ending):
        display.line(line)


def verdict_lines(made: Mapping[str, Path]) -> list[str]:
    """Return what the gate says, of the nodes that are there; empty without an evaluation or a gate."""
    review = _review(made) if "gate" in made else None
    if review is None:
        return []
    head = "THE GATE SAYS PROMOTE: " if review.outcome.kind == "promoted" else _VERDICTS[review.outcome.kind]
    return [f"{head}{review.outcome.sentence}", *([_NOTHING_BROKEN] if review.outcome.kind == "inconclusive" else [])]


def screen(made: Mapping[str, Path], ending: EndedRun) -> list[str]:
    """Return the lines: at most 25 of 80 columns for a refresh, longer paths and commands apart."""
    line = getattr(ending.config, "registry", None)
    asked = Invocation(ending.file, ending.overrides, line.name if line is not None else None)
    champion = line.champion if line is not None else None
    review = _review(made, champion.version if champion is not None else None)
    title = [ending.config.name, _target(made), review.machine if review is not None else "", duration(ending.seconds)]
    lines = [" · ".join(filter(None, title)), ""]
    steps: Sequence[Step] = ()
    if review is not None:
        asked = replace(asked, version=_version(asked, made, review) or asked.version)
        lines += [
            *_verdict(review, asked, ending),
            "",
            *_table(review, _json(made, "evaluation", "evaluation.json")),
        ]
        if review.checks:
            lines += _wrapped("Gate  " + "  ".join(f"{tick} {group}" for tick, group in review.ticks()), "      ")
        if "report" in made:
            steps = next_steps(review, asked, _seconds(made))
    elif "drift" in made and champion is not None:
        drift = json.loads((made["drift"] / "drift.json").read_text("utf-8"))["all"]
        before = number((champion.figures.get("all") or {}).get("tau"), ".2f")
        lines += _wrapped(
            f"CURRENT: {champion.line}@{champion.version} stays. Acceptance length {drift['tau']:.2f} on "
            f"{drift['prompts']} prompts, {before} at its promotion: no significant drift. Nothing was trained."
        )
        steps = [refresh_anyway(asked)]
    return [*lines, *_next(steps), "", *_where(made, review, ending)]


def _review(made: Mapping[str, Path], version: int | None = None) -> Review | None:
    """version: of the champion."""
    evaluation = _json(made, "evaluation", "evaluation.json")
    decision = _json(made, "gate", DECISION)
    return review_of(evaluation, decision if version is None else with_version(decision, version))


def _json(made: Mapping[str, Path], node: str, file: str) -> dict[str, Any]:
    path = made[node] / file if node in made else None
    return json.loads(path.read_text("utf-8")) if path is not None and path.is_file() else {}


def _target(made: Mapping[str, Path]) -> str:
    if "target" not in made or not (made["target"] / MANIFEST).is_file():
        return ""
    return target_name(str(read_manifest(made["target"]).config.get("source", "")))


def _version(asked: Invocation, made: Mapping[str, Path], review: Review) -> str | None:
    """The number under which the candidate was registered; None if MLflow cannot be asked."""
    if asked.line is None or review.candidate not in made:
        return None
    try:
        content = read_manifest(made[review.candidate]).content_id
        known = [each.number for each in registry().versions(asked.line) if each.content_id == content]
    except DraftsmithError:
        return None
    return str(known[-1]) if known else None


def _verdict(review: Review, asked: Invocation, ending: EndedRun) -> list[str]:
    kind, sentence = review.outcome.kind, review.outcome.sentence
    if kind == "promoted" and ending.refused is not None:  # the gate passed, and something else stood against it
        return _wrapped(f"NOT PROMOTED: {ending.refused}")
    if kind == "promoted":
        sentence = f"{asked.line}@{asked.version}. {review.outcome.followed}"
    return [
        *_wrapped(f"{_VERDICTS[kind]}{sentence}"),
        *([_NOTHING_BROKEN] if kind == "inconclusive" else []),
    ]


def _table(review: Review, evaluation: Mapping[str, Any]) -> list[str]:
    table = drafters(review, evaluation, short=True)
    rows = [[cell.replace("\n", " ") for cell in row] for row in [table.head, *table.rows]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]
    widths[0] = max(12, min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = ["  ".join([_cut(row[0], widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return [*lines, *_wrapped(table.caption)]


def _cut(name: str, width: int) -> str:
    """What differs between long names is often at their end."""
    return name.ljust(width) if len(name) <= width else f"…{name[1 - width :]}"


def _seconds(made: Mapping[str, Path]) -> dict[str, float]:
    there = [node for node in ("evaluation", "gate") if node in made and (made[node] / MANIFEST).is_file()]
    return {node: read_manifest(made[node]).duration_s for node in there}


def _next(steps: Sequence[Step]) -> list[str]:
    """A command may be copied with its comment."""
    lines = []
    for step in steps:
        whole = f"  {step.command}  # {step.label}"
        lines += [whole] if len(whole) <= WIDTH else [f"  # {step.label}", f"  {step.command}"]
    return ["What to do", *lines] if lines else []


def _where(made: Mapping[str, Path], review: Review | None, ending: EndedRun) -> list[str]:
    report = [f"Report   {_short(made['report'] / 'report.html')}"] if "report" in made else []
    folder = made[review.candidate] / DRAFTER_FOLDER if review is not None and review.candidate in made else None
    drafter = [f"Drafter  {_short(folder)}"] if folder is not None and folder.is_dir() else []
    return [*report, *drafter, f"MLflow   {ending.mlflow}"]


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


DETAIL = "detail/"  # prefix of every metric that is no headline
_HEADLINE = (
    *("tau.challenger", "tau.challenger.low", "tau.challenger.high", "tau.champion"),
    *("tau_gain", "tau_gain.low", "tau_gain.high"),
    *("rules_broken", "rules_unjudged", "cost.wall_s"),
)
_OF_A_MODEL = ("tau", "speedup")
_OF_SPEED = ("speedup", "tokens_per_s")  # headlines too, of the first setting that was measured


def review(made: Mapping[str, Path]) -> RunReview | None:
    """Return what the report's `review.json` says; None where the refresh has not come so far.

    made: node -> folder.
    """
    path = made["report"] / REVIEW if "report" in made else None
    if path is None or not path.is_file():
        return None
    told = json.loads(path.read_text("utf-8"))
    verdict = told["outcome"] or {}
    followed = verdict.get("followed")
    act = {**verdict, "label": "Promoted", "sentence": followed} if followed else verdict
    description, concluded = (_description(told, found, path.parent) for found in (verdict, act))
    tags = {OUTCOME: verdict["kind"]} if verdict else {}
    return RunReview(metric_names(told["figures"], _setting(made)), description, concluded, tags)


def compared(made: Mapping[str, Path]) -> dict[str, tuple[Manifest, Metrics]]:
    """Return each drafter that the evaluation compared: what made it, and its metrics by prompt set.

    made: node -> folder, with an evaluation.
    """
    evaluation = json.loads((made["evaluation"] / "evaluation.json").read_text("utf-8"))
    folders = dict(made.items())  # a drafter's manifest will do: nothing is fetched
    found: dict[str, tuple[Manifest, Metrics]] = {}
    for arm, acceptance in evaluation["drafters"].items():
        sets = {name: arms[arm] for name, arms in (evaluation.get("sets") or {}).items() if arm in arms}
        overall = {**acceptance, **((evaluation.get("speed") or {}).get(arm) or {})}
        metrics = {name: {key: each[key] for key in _OF_A_MODEL if key in each} for name, each in sets.items()}
        metrics[ALL] = {key: overall[key] for key in _OF_A_MODEL if key in overall}
        found[arm] = (read_manifest(folders[arm]), metrics)
    return found


def metric_names(metrics: Mapping[str, float], setting: str = "") -> dict[str, float]:
    """Return the metrics of a refresh under their names in MLflow: at most 12 headlines, the rest under `DETAIL`.

    setting: of the headlines on speed, such as `c16.t0`.
    """
    headlines = {*_HEADLINE, *(f"{name}.{setting}" for name in _OF_SPEED)}
    return {name if name in headlines else f"{DETAIL}{name}": value for name, value in metrics.items()}


def _setting(made: Mapping[str, Path]) -> str:
    """Return the setting of the evaluation's headline; empty where no speed was measured."""
    path = made["evaluation"] / "evaluation.json" if "evaluation" in made else None
    evaluation = json.loads(path.read_text("utf-8")) if path is not None and path.is_file() else {}
    known = {name: evaluation.get(name) for name in ("concurrency", "temperature")}
    return "" if None in known.values() else point_name(known)


def _description(told: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> str:
    """Return the verdict or what was done, why, and where the report is, in Markdown."""
    lines = []
    if found:
        lines += [f"**{found['label']}.** {escape_markdown(found['sentence'])}", ""]
        lines += [f"- {escape_markdown(reason)}" for reason in found["reasons"]]
    if told["doubts"]:
        lines += ["", "Not to be relied on:", "", *(f"- {escape_markdown(doubt)}" for doubt in told["doubts"])]
    return "\n".join([*lines, "", f"Report: `{folder / 'report.html'}`"]).strip()
