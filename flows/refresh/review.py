"""A refresh as MLflow shows it: headline metrics, the verdict, and where the report is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftsmith.artifacts.manifest import Manifest, read_manifest
from draftsmith.artifacts.mlflow_models import ALL, Metrics
from draftsmith.artifacts.mlflow_terms import plain_markdown
from draftsmith.artifacts.refreshes import OUTCOME
from draftsmith.flows.pipeline.graph import Review
from draftsmith.stages.report import REVIEW
from draftsmith.stages.reporting.figures import point_name

DETAIL = "detail/"  # prefix of every metric that is no headline
_HEADLINE = (
    *("tau.challenger", "tau.challenger.low", "tau.challenger.high", "tau.champion"),
    *("tau_gain", "tau_gain.low", "tau_gain.high"),
    *("rules_broken", "rules_unjudged", "cost.wall_s"),
)
_OF_A_MODEL = ("tau", "speedup")
_OF_SPEED = ("speedup", "tokens_per_s")  # headlines too, of the first setting that was measured


def review(made: Mapping[str, Path]) -> Review | None:
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
    return Review(metric_names(told["figures"], _setting(made)), description, concluded, tags)


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
        lines += [f"**{found['label']}.** {plain_markdown(found['sentence'])}", ""]
        lines += [f"- {plain_markdown(reason)}" for reason in found["reasons"]]
    if told["doubts"]:
        lines += ["", "Not to be relied on:", "", *(f"- {plain_markdown(doubt)}" for doubt in told["doubts"])]
    return "\n".join([*lines, "", f"Report: `{folder / 'report.html'}`"]).strip()
