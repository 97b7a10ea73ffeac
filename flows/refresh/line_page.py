"""The page of a model line: its champion, the rows it was trained on, the last outcome, its servers, the next run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.artifacts.home import home
from draftsmith.artifacts.results.data import LogsSummary
from draftsmith.artifacts.results.evaluation import ALL
from draftsmith.artifacts.store.manifest import local_time
from draftsmith.artifacts.tracking import refresh_runs
from draftsmith.artifacts.tracking.registry import BY_HAND, ROLLED_BACK, Version
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.execution.display import Display
from draftsmith.flows.orchestration.server import permanent_server
from draftsmith.flows.refresh.champion import earlier_answers
from draftsmith.flows.refresh.swap import swapped_servers
from draftsmith.flows.refresh.versions import registry


def show_line(display: Display, line: str, urls: Sequence[str]) -> None:
    """Print the page of a line, with what its servers say. urls: same as for `watch`.

    Raises DraftsmithError for an unknown line, and as MLflow's registry does. A Prefect server that does not answer is
    only reported.
    """
    if not registry().versions(line) and refresh_runs.last_refresh(Tracking(home(), line)) is None:
        raise registry().unknown_line(line)
    champion = registry().champion(line)
    display.line(f"champion: {'none' if champion is None else _champion(champion)}")
    if champion is not None and (read := _rows_read(champion)):
        display.line(f"its data: {read}")
    display.line(f"last refresh: {last_refresh(line)}")
    display.line(f"next run: {_next_run(line)}")
    if not (urls or swapped_servers(line)):
        display.line(f"servers: none is known (`draftsmith swap {line} --url URL` records one)")
        return
    from draftsmith.flows.refresh.watch import show_servers  # imports a client of servers

    show_servers(display, line, urls)


def _champion(champion: Version) -> str:
    """Return since when and why a version serves, and its metrics."""
    events = [event for event in registry().events(champion.line) if event.version == champion.number]
    since = f" since {local_time(events[-1].at)}, by {events[-1].by}: {events[-1].why}" if events else ""
    names, metrics = {"tau": "tau", "speedup": "speed-up"}, champion.metrics().get(ALL, {})
    measured = [f"{text} {metrics[name]:.3f}" for name, text in names.items() if metrics.get(name) is not None]
    return "; ".join([f"version {champion.number}{since}", *measured])


def _rows_read(champion: Version) -> str:
    """Return the window of the logged rows that a version was trained on; empty if it has read none."""
    answers = earlier_answers(champion)
    summary = LogsSummary.read_if_there(Path(answers.folder) if answers is not None else None)
    newest = champion.tags.get("read_until", "")
    if summary is None:  # the store is elsewhere, or was pruned
        return f"logged answers until {local_time(newest)}" if newest else ""
    begin = summary.window.since or summary.window.after
    window = [f"{word} {local_time(at)}" for word, at in (("from", begin), ("until", summary.window.newest)) if at]
    return " ".join([f"{summary.used:,} logged answers", *window])


def last_refresh(line: str) -> str:
    """Return how the line's last refresh ended, what a person did since, or for whom it waits."""
    lines, endings = registry(), []  # of equal times the first is shown
    for version in lines.versions(line)[-1:]:
        if version.waits:
            at = version.tags.get("refreshed_at") or version.created_at
            promote = f"`draftsmith promote {line}@{version.number}`, or resume its run in Prefect"
            endings.append((at, "waiting", f"for a person to approve version {version.number}: {promote}"))
    events = [event for event in lines.events(line) if event.what in (BY_HAND, ROLLED_BACK)]
    for event in events[-1:]:
        what = "rolled back" if event.what == ROLLED_BACK else event.what
        endings.append((event.at, what, f"version {event.version} serves, by {event.by}: {event.why}"))
    if (last := refresh_runs.last_refresh(Tracking(home(), line))) is not None:
        endings.append((last.at, last.outcome, last.text))
    if not endings:
        return "none of this line in MLflow"
    at, outcome, text = max(endings, key=itemgetter(0))
    return f"{outcome.upper()}, {local_time(at)}: {text}"


def _next_run(line: str) -> str:
    """Return when Prefect's deployments of the line run next, and how the last run ended if it failed or waits."""
    if not os.environ.get("PREFECT_API_URL"):
        return "unknown: PREFECT_API_URL names no Prefect server"
    try:
        permanent_server(home())
        from draftsmith.flows.orchestration.deployment import runs_of_line  # imports Prefect

        return "; ".join(runs_of_line(line)) or "no deployment of this line"
    except DraftsmithError as error:
        return f"unknown: {one_line(error)}"
