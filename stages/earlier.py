"""Stage `earlier`: the logged answers that the champion was trained on, taken into the next refresh of its line.

Its key is their content and whose they are, wherever the file lies. Stage `logs` mixes a share of them in
(`logs.replay_share`) if the target and the tokenizer are still those that gave them, and uses none of them again where
its window reaches back behind them (`logs.lateness_hours`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.contract import Config, Operational, Stage, StageContext

TABLE = "trajectories.parquet"


class EarlierConfig(Config):
    """Answers of a refresh that promoted its drafter."""

    folder: Annotated[str, Operational()]
    """Of the artifact that holds them."""
    sha256: str
    """Of their table."""
    target_digest: str = ""
    """Of the target that gave them; empty where nobody knows."""
    tokenizer_digest: str = ""
    """Of its tokenizer; empty where nobody knows, as of versions that did not say it."""


def run(ctx: StageContext, config: EarlierConfig) -> None:
    """Copy the table, verified, and write whose answers they are. Raises DraftsmithError if it is gone or another."""
    import shutil

    from draftsmith.artifacts.atomic import atomic_path, write_text
    from draftsmith.artifacts.home import home
    from draftsmith.artifacts.manifest import sha256_file
    from draftsmith.artifacts.open_store import store_of
    from draftsmith.stages.prompting.earlier import ORIGIN

    store, folder = store_of(home()), Path(config.folder)
    source = store.here(folder) / TABLE
    if not source.is_file():  # of a home that was moved, or is a copy; its checksum says whether it is the one
        source = store.root / folder.parent.name / folder.name / TABLE
    advice = "restore it, or set logs.replay_share and logs.lateness_hours to 0"
    if not source.is_file():
        raise DraftsmithError(f"{source}: the answers of the champion's refresh are not here: {advice}")
    with atomic_path(ctx.out / TABLE) as path:
        shutil.copyfile(source, path)
        if sha256_file(path) != config.sha256:
            raise DraftsmithError(f"{source}: has changed since the champion was trained on it: {advice}")
    write_text(ctx.out / ORIGIN, config.model_dump_json(include={"target_digest", "tokenizer_digest"}) + "\n")


STAGE = Stage(name="earlier", config=EarlierConfig, inputs=(), run=run)
