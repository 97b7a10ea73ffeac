"""Stage `earlier`: the logged answers that the champion was trained on, for the next refresh of its model line.

Its cache key is their content and their target, wherever the file is. Stage `logs` mixes a share of them in
(`logs.replay_share`) if the target and the tokenizer are still the same. It also skips these answers where its window
overlaps what the champion's refresh has read (`logs.lateness_hours`), for which their digests suffice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.mirror import Store, open_store
from draftsmith.stages.runtime.stage import Config, NotInKey, Stage

TABLE = "trajectories.parquet"


class EarlierConfig(Config):
    """Answers of a refresh that promoted its drafter."""

    folder: Annotated[str, NotInKey()]
    """The artifact that holds them."""
    sha256: str
    """Checksum of their table."""
    target_digest: str
    """The target that gave them."""
    tokenizer_digest: str
    """Its tokenizer."""
    replayed: bool = True
    """Whether they may be mixed in. The artifact then holds the answers themselves, else their digests alone."""


def is_available(config: EarlierConfig) -> bool:
    """Return whether this machine or the store's bucket has the answers, without fetching them.

    Raises RetryableError if the bucket does not answer.
    """
    store, folder = open_store(home()), Path(config.folder)
    if any((path / TABLE).is_file() for path in (folder, folder_in_home(store, folder))):
        return True
    manifest = store.manifest_at(folder.parent.name, folder.name)
    return manifest is not None and TABLE in manifest.files


def folder_in_home(store: Store, folder: Path) -> Path:
    """Return where this home has the artifact if it is a copy of the folder's home, or that home after a move."""
    return store.root / folder.parent.name / folder.name


STAGE = Stage(name="earlier", config=EarlierConfig, inputs=(), body="draftsmith.stages.data.logs.rehearsal")
