"""Two refreshes side by side: figures, verdicts, and which fields of their configs differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.open_store import store_of
from draftsmith.artifacts.refreshes import folders_of
from draftsmith.artifacts.store import Store
from draftsmith.artifacts.text import flat, short
from draftsmith.artifacts.tracking import Tracking
from draftsmith.flows.pipeline.config_file import read_config
from draftsmith.flows.pipeline.display import Display, figure
from draftsmith.flows.pipeline.graph import Pipeline, plan, resolved
from draftsmith.flows.pipeline.options import RunOptions
from draftsmith.stages.report import REVIEW
from draftsmith.stages.reporting.names import ABSENT

_PAGE = "report.html"
_ABSENT_FIELD = "(not there)"


@dataclass(frozen=True)
class Reported:
    """A refresh that has a report."""

    name: str  # as it was asked for
    folder: Path  # of the report's artifact

    @property
    def label(self) -> str:
        """Of a column: an id is known by its beginning."""
        return self.name[:12] if len(self.name) == 32 else self.name

    @property
    def page(self) -> Path:
        return self.folder / _PAGE

    def review(self) -> dict[str, Any]:
        """Raises DraftsmithError for a report of an earlier version."""
        path = self.folder / REVIEW
        if not path.is_file():
            raise DraftsmithError(f"{self.name}: {path} is missing: make the report again (`--force report`)")
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return found


def report(display: Display, names: Sequence[str], pipeline: Pipeline, *, in_browser: bool = False) -> None:
    """Where the page of a refresh is, or what differs between two of them. names: config files, runs of MLflow,
    artifacts; pipeline: of the config files."""
    if len(names) > 2:
        raise DraftsmithError(f"{len(names)} refreshes: give one, or two to compare")
    found = [
        _report_of_file(name, pipeline) if name.endswith((".yaml", ".yml")) else report_of_text(name) for name in names
    ]
    if len(found) == 2:
        compare(display, found[0], found[1])
    else:
        display.line(str(found[0].page))
    if in_browser:
        import webbrowser

        for reported in found:
            webbrowser.open(reported.page.as_uri())


def _report_of_file(name: str, pipeline: Pipeline) -> Reported:
    return report_of_config(name, read_config(Path(name), [], pipeline.config), pipeline)


def report_of_config(name: str, config: RunOptions, pipeline: Pipeline) -> Reported:
    """The report that a config's refresh would reuse, or else the last that one of its name has made: a line goes on
    from another champion by now. Raises DraftsmithError if there is none."""
    node, _ = pipeline.report
    store = store_of(home())
    for planned in plan(resolved(config, pipeline), store, pipeline, again=True, stop_at_damage=False):
        if planned.node.name == node and planned.ref is not None:
            store.fetch(planned.ref)
            return Reported(name, planned.ref.path)
    last = folders_of(Tracking(home(), config.experiment), config.name, node).get(node)
    if last is not None:
        return _checked(name, _here(store, Path(last)))
    raise DraftsmithError(
        f"{name}: its refresh has no report yet: run `draftsmith run {name}`, or name a run of MLflow"
    )


def report_of_text(name: str) -> Reported:
    """Of an artifact of stage `report` (folder, start of a key or content id), or of a refresh's run in MLflow (its
    name or id; of several runs of a name the last). Raises DraftsmithError."""
    store = store_of(home())
    if Path(name).expanduser().is_dir():
        return _checked(name, Path(name).expanduser().resolve())
    found = folders_of(Tracking(home()), name, "report")
    if "report" in found:
        return _checked(name, _here(store, Path(found["report"])))
    try:
        ref = store.resolve(name)
        store.fetch(ref)
        return _checked(name, ref.path)
    except RetryableError:
        raise
    except DraftsmithError as error:
        raise DraftsmithError(
            f"{name}: neither a config file, nor a refresh's run in MLflow with a report, nor an artifact ({error})"
        ) from error


def _here(store: Store, folder: Path) -> Path:
    """The artifact that a run kept as this folder: in a home that was moved since, by its stage and key."""
    kept, own = store.here(folder), store.path(folder.parent.name, folder.name)
    return own if own.is_dir() and not kept.is_dir() else kept


def _checked(name: str, folder: Path) -> Reported:
    if not (folder / _PAGE).is_file():
        raise DraftsmithError(
            f"{name}: {folder} holds no {_PAGE}: give a report's artifact; if it was pruned, its run in MLflow has that"
        )
    return Reported(name, folder)


def compare(display: Display, first: Reported, second: Reported) -> None:
    """Verdicts, every figure that both or either has, and the fields in which the configs differ."""
    one, other = first.review(), second.review()
    for told, reported in ((one, first), (other, second)):
        verdict = told["outcome"] or {"label": ABSENT, "sentence": "nothing was measured"}
        display.line(f"{reported.label}: {verdict['label']}. {verdict['sentence']}")
        for doubt in told["doubts"]:
            display.line(f"  not to be relied on: {doubt}")
    display.table(["figure", first.label, second.label, "difference"], figure_rows(one["figures"], other["figures"]))
    changed = config_rows(one["config"], other["config"])
    if changed:
        display.table(["field", first.label, second.label], changed, title="Config", text_columns=3)
    else:
        display.line("their configs are the same")
    for reported in (first, second):
        display.line(f"  report:   {reported.page}")


def figure_rows(one: Mapping[str, float], other: Mapping[str, float]) -> list[list[str]]:
    """Every figure by its name, and its difference."""
    rows = []
    for name in sorted({*one, *other}):
        values = one.get(name), other.get(name)
        known = [value for value in values if value is not None and math.isfinite(value)]
        difference = ABSENT
        if len(known) == len(values):
            change = known[1] - known[0]
            difference = "=" if math.isclose(*known, rel_tol=1e-12) else f"{'+' * (change > 0)}{figure(change)}"
        rows.append([name, *(figure(value) if value in known else ABSENT for value in values), difference])
    return rows


def config_rows(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[list[str]]:
    """The fields in which two configs differ, by their path."""
    fields = [flat(config) for config in (one, other)]
    return [
        [name, *(short(each[name]) if name in each else _ABSENT_FIELD for each in fields)]
        for name in dict.fromkeys([*fields[0], *fields[1]])
        if fields[0].get(name, _ABSENT_FIELD) != fields[1].get(name, _ABSENT_FIELD)
    ]
