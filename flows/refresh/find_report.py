"""Finds the report of a refresh by its config file, its run in MLflow, or its artifact."""

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
    """Return the report page of a refresh. Raises DraftsmithError if there is none.

    name: a config file (of `pipeline`), a run of MLflow, or an artifact.
    """
    if name.endswith((".yaml", ".yml")):
        return report_of_config(name, read_config(Path(name), [], pipeline.config), pipeline)
    return report_of_text(name)


def report_of_config(name: str, config: RunOptions, pipeline: Pipeline) -> Path:
    """Return the report that a config's refresh would reuse, or else the last one of a refresh of its name.

    After a promotion a refresh plans from another champion, so its report is no longer in the plan. Raises
    DraftsmithError if there is none.
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
        return _page(name, _current_folder(store, Path(last)))
    raise DraftsmithError(
        f"{name}: its refresh has no report yet. Run `draftsmith run {name}`, or name a run in MLflow."
    )


def report_of_text(name: str) -> Path:
    """Return the page of an artifact of stage `report`, or of a refresh's run in MLflow.

    name: the artifact's folder, or the start of its key or content id; or name or id of a run (the last of its name).
    Raises DraftsmithError if there is none.
    """
    store = open_store(home())
    if Path(name).expanduser().is_dir():
        return _page(name, Path(name).expanduser().resolve())
    found = artifact_folders(Tracking(home()), name, "report")
    if "report" in found:
        return _page(name, _current_folder(store, Path(found["report"])))
    try:
        ref = store.resolve(name)
        store.fetch(ref)
        return _page(name, ref.path)
    except RetryableError:
        raise
    except DraftsmithError as error:
        raise DraftsmithError(
            f"{name}: not a config file, a refresh's run in MLflow with a report, or an artifact ({error})"
        ) from error


def _current_folder(store: Store, folder: Path) -> Path:
    """Return the folder of an artifact that a run recorded; if the home was moved, the one of its stage and key."""
    recorded, current = store.localize(folder), store.path(folder.parent.name, folder.name)
    return current if current.is_dir() and not recorded.is_dir() else recorded


def _page(name: str, folder: Path) -> Path:
    if not (folder / _PAGE).is_file():
        raise DraftsmithError(
            f"{name}: {folder} has no {_PAGE}. Give a report's artifact; of a pruned one, MLflow has the page."
        )
    return folder / _PAGE
