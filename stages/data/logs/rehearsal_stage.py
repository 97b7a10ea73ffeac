"""Stage `earlier`: the logged answers that the champion was trained on, taken into the next refresh of its line.

Its key is their content and whose they are, wherever the file lies. Stage `logs` mixes a share of them in
(`logs.replay_share`) if the target and the tokenizer are still those that gave them, and uses none of them again where
its window reaches back behind them (`logs.lateness_hours`): for that it needs no more than their digests.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.stage import Config, NotInKey, Stage, StageContext

if TYPE_CHECKING:
    from draftsmith.artifacts.store.local import Store

TABLE = "trajectories.parquet"


class EarlierConfig(Config):
    """Answers of a refresh that promoted its drafter."""

    folder: Annotated[str, NotInKey()]
    """Of the artifact that holds them."""
    sha256: str
    """Of their table."""
    target_digest: str
    """Of the target that gave them."""
    tokenizer_digest: str
    """Of its tokenizer."""
    replayed: bool = True
    """Whether they may be mixed in: then the artifact has the answers themselves, else their digests alone."""


def is_here(config: EarlierConfig) -> bool:
    """Whether this machine or the store's bucket has the answers. Fetches nothing; raises RetryableError if the bucket
    does not answer."""
    from draftsmith.artifacts.home import home
    from draftsmith.artifacts.store.mirror import open_store

    store, folder = open_store(home()), Path(config.folder)
    if any((place / TABLE).is_file() for place in (folder, _in_this_home(store, folder))):
        return True
    stored = store.manifest_at(folder.parent.name, folder.name)
    return stored is not None and TABLE in stored.files


def _in_this_home(store: Store, folder: Path) -> Path:
    """Where the artifact of a home that was moved, or of one that this is a copy of, would be."""
    return store.root / folder.parent.name / folder.name


def run(ctx: StageContext, config: EarlierConfig) -> None:
    """Write the digests of the answers, whose they are and, to be replayed, a copy of their table, all of it verified.
    Raises DraftsmithError if the table is gone or another."""
    from draftsmith.artifacts.atomic import atomic_path, write_text
    from draftsmith.artifacts.home import home
    from draftsmith.artifacts.store.manifest import sha256_file
    from draftsmith.artifacts.store.mirror import open_store
    from draftsmith.stages.data.logs.rehearsal import ORIGIN, write_contents

    store, folder = open_store(home()), Path(config.folder)
    source = store.localize(folder) / TABLE
    if not source.is_file():  # its checksum says whether it is the one
        source = _in_this_home(store, folder) / TABLE
    advice = "restore it, or set logs.replay_share and logs.lateness_hours to 0"
    if not source.is_file():
        raise DraftsmithError(f"{source}: the answers of the champion's refresh are not here: {advice}")
    with atomic_path(ctx.out / TABLE) if config.replayed else nullcontext(source) as path:
        if config.replayed:
            shutil.copyfile(source, path)
        if sha256_file(path) != config.sha256:
            raise DraftsmithError(f"{source}: has changed since the champion was trained on it: {advice}")
        write_contents(ctx.out, path)
    write_text(ctx.out / ORIGIN, config.model_dump_json(include={"target_digest", "tokenizer_digest"}) + "\n")


STAGE = Stage(name="earlier", config=EarlierConfig, inputs=(), body=__name__)
