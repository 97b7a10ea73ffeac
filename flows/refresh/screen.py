"""The screen at the end of a refresh, and what MLflow shows of it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.data import day
from draftsmith.artifacts.results.evaluation import DriftResult, EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision, Outcome, ReviewResult
from draftsmith.artifacts.store.manifest import MANIFEST, Manifest, read_manifest
from draftsmith.artifacts.tracking.refresh_runs import ALL, OUTCOME, Metrics
from draftsmith.artifacts.tracking.terms import escape_markdown
from draftsmith.flows.execution.display import Display, EndedRun
from draftsmith.flows.planning.plan import UNSERVED, RunReview
from draftsmith.flows.refresh.versions import registry
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.report.review import Review, duration, name_of, number, review_of, target_name
from draftsmith.stages.report.tables import Step, choice_sentence, next_steps, refresh_anyway
from draftsmith.stages.report.tables import drafters as drafter_table
from draftsmith.stages.runtime.invocation import Invocation

WIDTH, LINES = 80, 25
_VERDICTS = {
    "promoted": "PROMOTED: ",
    "refused": "NOT PROMOTED: refused. ",
    "inconclusive": "NOT PROMOTED: inconclusive. ",
    "measured": "MEASURED: ",
}
_NOTHING_BROKEN = "Nothing is broken. Drafters, answers and acceptance lengths are valid."


def show_results(display: Display, folders: Mapping[str, Path], ended: EndedRun) -> None:
    """Print the screen at the end of a run. folders: node -> folder of its artifact."""
    display.line("")
    for line in screen(folders, ended):
        display.line(line)


def screen(folders: Mapping[str, Path], ending: EndedRun) -> list[str]:
    """Return the lines of the screen, at most 25 with 80 columns, except for long paths and commands."""
    line = getattr(ending.config, "registry", None)
    name = line.name if line is not None else None
    command = Invocation(ending.file, ending.overrides, name, mlflow=ending.mlflow)
    champion = line.champion if line is not None else None
    review = _review(folders, champion.version if champion is not None else None)
    machine = review.machine if review is not None else ""
    title = [ending.config.name, _target(folders), machine, duration(ending.seconds)]
    verdict, rest = "", list[str]()
    steps: Sequence[Step] = ()
    if review is not None:
        command = replace(command, version=_version(command, folders, review) or command.version)
        verdict = _verdict(review, command, ending)
        rest = [_NOTHING_BROKEN] if review.outcome.kind == "inconclusive" else []
        evaluation = EvaluationResult.read(folders["evaluation"])
        rest += ["", *_table(review, evaluation)]
        if review.checks and evaluation.better_arm is not None:
            rest += _wrapped(choice_sentence(evaluation))
        if review.checks:
            rest += _wrapped("Gate  " + "  ".join(f"{tick} {group}" for tick, group in review.ticks()), "      ")
        if "report" in folders:
            steps = next_steps(review, command, _seconds(folders))
    elif "drift" in folders and champion is not None:
        drift = DriftResult.read(folders["drift"]).overall
        before = number((champion.figures.get("all") or {}).get("tau"), ".2f")
        verdict = (
            f"CURRENT: {champion.line}@{champion.version} stays. Acceptance length {drift.tau or 0.0:.2f} on "
            f"{drift.prompts} prompts, {before} at its promotion: no significant drift. Nothing was trained."
        )
        if ending.refused is not None:
            rest = _wrapped(f"NOT SERVED: {ending.refused}")
        steps = [refresh_anyway(command)]
    rest += [*_next(steps), "", *_where(folders, review, ending)]
    left = max(1, LINES - 2 - len(rest))
    return [" · ".join(filter(None, title)), "", *_wrapped(verdict, most=left), *rest]


def _review(folders: Mapping[str, Path], version: int | None = None) -> Review | None:
    """Return the review of evaluation and gate. version: the champion's."""
    evaluation = EvaluationResult.read_if_there(folders.get("evaluation"))
    if evaluation is None:
        return None
    decision = GateDecision.read_if_there(folders.get("gate"))
    return review_of(evaluation, decision.with_version(version) if decision and version is not None else decision)


def _target(folders: Mapping[str, Path]) -> str:
    if "target" not in folders or not (folders["target"] / MANIFEST).is_file():
        return ""
    return target_name(str(read_manifest(folders["target"]).config.get("source", "")))


def _version(command: Invocation, folders: Mapping[str, Path], review: Review) -> str | None:
    """Return the version of the challenger; None if it has none or MLflow does not answer."""
    if command.line is None or review.challenger not in folders:
        return None
    try:
        content = read_manifest(folders[review.challenger]).content_id
        numbers = [version.number for version in registry().versions(command.line) if version.content_id == content]
    except DraftsmithError:
        return None
    return str(numbers[-1]) if numbers else None


def _verdict(review: Review, command: Invocation, ending: EndedRun) -> str:
    kind, sentence = review.outcome.kind, review.outcome.sentence
    if kind == "promoted" and ending.refused is not None:
        # the gate passed, but a rollback or an approval stops it, or a server does not draft with it
        head = "PROMOTED, NOT SERVED: " if ending.outcome == UNSERVED else "NOT PROMOTED: "
        return f"{head}{ending.refused}"
    if kind == "promoted":
        sentence = f"{command.line}@{command.version}. {review.outcome.followed}"
    return f"{_VERDICTS[kind]}{sentence}"


def _table(review: Review, evaluation: EvaluationResult) -> list[str]:
    table = drafter_table(review, evaluation, short=True)
    rows = [[cell.replace("\n", " ") for cell in row] for row in [table.head, *table.rows]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]
    widths[0] = max(12, min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = ["  ".join([_cut(row[0], widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return [*lines, *_wrapped(table.caption)]


def _cut(name: str, width: int) -> str:
    """Pad or cut a name from its start, as long names often differ at their end."""
    return name.ljust(width) if len(name) <= width else f"…{name[1 - width :]}"


def _seconds(folders: Mapping[str, Path]) -> dict[str, float]:
    nodes = [node for node in ("evaluation", "gate") if node in folders and (folders[node] / MANIFEST).is_file()]
    return {node: read_manifest(folders[node]).duration_s for node in nodes}


def _next(steps: Sequence[Step]) -> list[str]:
    """Return each next step as a command with its label as a comment, so that both can be pasted into a shell."""
    lines = []
    for step in steps:
        line = f"  {step.command}  # {step.label}"
        lines += [line] if len(line) <= WIDTH else [f"  # {step.label}", f"  {step.command}"]
    return ["What to do", *lines] if lines else []


def _where(folders: Mapping[str, Path], review: Review | None, ending: EndedRun) -> list[str]:
    report = [f"Report   {_short(folders['report'] / 'report.html')}"] if "report" in folders else []
    folder = (
        folders[review.challenger] / DRAFTER_FOLDER if review is not None and review.challenger in folders else None
    )
    drafter = [f"Drafter  {_short(folder)}"] if folder is not None and folder.is_dir() else []
    return [*report, *drafter, f"MLflow   {ending.mlflow}"]


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _wrapped(text: str, indent: str = "", most: int | None = None) -> list[str]:
    """Return the text in lines. most: number of lines to keep; the report and the log have all of the text."""
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, max_lines=most, placeholder=" …"
    )


_HEADLINE = (
    *("tau.challenger", "tau.challenger.low", "tau.challenger.high", "tau.champion"),
    *("tau_gain", "tau_gain.low", "tau_gain.high"),
    *("rules_broken", "rules_unjudged", "cost.wall_s"),
)
_MODEL_METRICS = ("tau", "speedup")  # logged with a model
_SPEED_HEADLINES = ("speedup", "tokens_per_s")  # logged at the first setting


def review(folders: Mapping[str, Path]) -> RunReview | None:
    """Return the review in the report's `review.json`; None without a report. folders: node -> folder."""
    review = ReviewResult.read_if_there(folders.get("report"))
    if review is None:
        return None
    verdict = promoted = review.outcome
    if verdict.followed:
        promoted = verdict.model_copy(update={"label": "Promoted", "sentence": verdict.followed})
    description, concluded = (_description(review, outcome, folders["report"]) for outcome in (verdict, promoted))
    evaluation = EvaluationResult.read_if_there(folders.get("evaluation"))
    metrics = headlines_of(review.metrics, evaluation.setting if evaluation is not None else "")
    return RunReview(metrics, description, concluded, {OUTCOME: verdict.kind})


def compared(folders: Mapping[str, Path]) -> dict[str, tuple[Manifest, Metrics]]:
    """Return display name -> manifest and metrics by slice, for each drafter that the evaluation compared.

    folders: node -> folder; one of the nodes is an evaluation.
    """
    when = day(datetime.fromisoformat(read_manifest(folders["evaluation"]).created_at))
    evaluation = EvaluationResult.read(folders["evaluation"])
    paths = dict(folders.items())  # only manifests are read, so nothing is fetched
    drafters: dict[str, tuple[Manifest, Metrics]] = {}
    for arm, acceptance in evaluation.drafters.items():
        if arm not in paths:  # the target's own head is no node
            continue
        records = {name: arms[arm].to_json() for name, arms in evaluation.sets.items() if arm in arms}
        records[ALL] = acceptance.to_json() | (evaluation.speed[arm].to_json() if arm in evaluation.speed else {})
        metrics = {
            name: {key: record[key] for key in _MODEL_METRICS if key in record} for name, record in records.items()
        }
        drafters[f"{name_of(arm)}, {when}"] = (read_manifest(paths[arm]), metrics)
    return drafters


def headlines_of(metrics: Mapping[str, float], setting: str = "") -> dict[str, float]:
    """Return the metrics of a refresh that MLflow gets, at most 12; the others are in `review.json`.

    setting: the setting of the speed headlines, such as `c16.t0`.
    """
    headlines = {*_HEADLINE, *(f"{name}.{setting}" for name in _SPEED_HEADLINES)}
    return {name: value for name, value in metrics.items() if name in headlines}


def _description(review: ReviewResult, outcome: Outcome, folder: Path) -> str:
    """Return the outcome with its reasons, speed warnings and the report's path, in Markdown."""
    lines = [f"**{outcome.label}.** {escape_markdown(outcome.sentence)}", ""]
    lines += [f"- {escape_markdown(reason)}" for reason in outcome.reasons]
    if review.speed_warnings:
        lines += ["", "Unreliable:", "", *(f"- {escape_markdown(warning)}" for warning in review.speed_warnings)]
    return "\n".join([*lines, "", f"Report: `{folder / 'report.html'}`"]).strip()
