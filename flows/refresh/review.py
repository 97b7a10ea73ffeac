"""A refresh as MLflow shows it: the report's figures and verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftsmith.flows.pipeline.graph import Review
from draftsmith.stages.report import REVIEW


def review(made: Mapping[str, Path]) -> Review | None:
    """Of the report's `review.json`; None where the refresh has not come so far."""
    path = made["report"] / REVIEW if "report" in made else None
    if path is None or not path.is_file():
        return None
    told = json.loads(path.read_text("utf-8"))
    verdict = told["outcome"] or {}
    followed = verdict.get("followed")
    act = {**verdict, "label": "Promoted", "sentence": followed} if followed else verdict
    description, concluded = (_description(told, found, path.parent) for found in (verdict, act))
    return Review(told["figures"], description, concluded, _tags(told))


def _description(told: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> str:
    """The verdict or what was done, why, and where the report is; in Markdown."""
    lines = []
    if found:
        lines += [f"**{found['label']}.** {_plain(found['sentence'])}", ""]
        lines += [f"- {_plain(reason)}" for reason in found["reasons"]]
    if told["doubts"]:
        lines += ["", "Not to be relied on:", "", *(f"- {_plain(doubt)}" for doubt in told["doubts"])]
    return "\n".join([*lines, "", f"Report: `{folder / 'report.html'}`"]).strip()


def _plain(text: str) -> str:
    """Names of prompt sets are anyone's words: no markup of theirs acts."""
    return text.replace("<", "&lt;").replace("[", "\\[").replace("`", "\\`")


def _tags(told: Mapping[str, Any]) -> dict[str, str]:
    outcome = {} if told["outcome"] is None else {"draftsmith.outcome": told["outcome"]["kind"]}
    return outcome | {"draftsmith.doubts": " ".join(told["doubts"])[:4000]} if told["doubts"] else outcome
