"""Find the report of a refresh: by its config file, its run in MLflow, or the report's artifact."""

from __future__ import annotations

from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tracking.refresh_runs import artifact_folders
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.config.load import read_config
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.planning.graph import Pipeline, Selection, plan, resolve_config

_PAGE = "report.html"


def find_report(name: str, pipeline: Pipeline) -> Path:
    """Return the page of a refresh. Raises DraftsmithError if there is none.

    name: a config file (of `pipeline`), a run of MLflow, or an artifact.
    """
    if name.endswith((".yaml", ".yml")):
        return report_of_config(name, read_config(Path(name), [], pipeline.config), pipeline)
    return report_of_text(name)


def report_of_config(name: str, config: RunOptions, pipeline: Pipeline) -> Path:
    """Return the report that a config's refresh would reuse, or else the last that one of its name has made.

    A line goes on from another champion after a promotion. Raises DraftsmithError if there is none.
    """
    node, _ = pipeline.report
    store = open_store(home())
    last_listing = Selection(reuse_listing=True)
    for planned in plan(resolve_config(config, pipeline), store, pipeline, last_listing, stop_at_damage=False):
        if planned.node.name == node and planned.ref is not None:
            store.fetch(planned.ref)
            return planned.ref.path / _PAGE
    last = artifact_folders(Tracking(home(), config.experiment), config.name, node).get(node)
    if last is not None:
        return _page(name, _here(store, Path(last)))
    raise DraftsmithError(
        f"{name}: its refresh has no report yet: run `draftsmith run {name}`, or name a run of MLflow"
    )


def report_of_text(name: str) -> Path:
    """Return the page of an artifact of stage `report` (folder, start of a key or content id), or of a refresh's run in
    MLflow (its name or id; of several runs of a name the last). Raises DraftsmithError."""
    store = open_store(home())
    if Path(name).expanduser().is_dir():
        return _page(name, Path(name).expanduser().resolve())
    found = artifact_folders(Tracking(home()), name, "report")
    if "report" in found:
        return _page(name, _here(store, Path(found["report"])))
    try:
        ref = store.resolve(name)
        store.fetch(ref)
        return _page(name, ref.path)
    except RetryableError:
        raise
    except DraftsmithError as error:
        raise DraftsmithError(
            f"{name}: neither a config file, nor a refresh's run in MLflow with a report, nor an artifact ({error})"
        ) from error


def _here(store: Store, folder: Path) -> Path:
    """Return the artifact that a run kept as this folder: in a home that was moved since, by its stage and key."""
    kept, own = store.localize(folder), store.path(folder.parent.name, folder.name)
    return own if own.is_dir() and not kept.is_dir() else kept


def _page(name: str, folder: Path) -> Path:
    if not (folder / _PAGE).is_file():
        raise DraftsmithError(
            f"{name}: {folder} holds no {_PAGE}: give a report's artifact; if it was pruned, its run in MLflow has that"
        )
    return folder / _PAGE
