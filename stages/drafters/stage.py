"""Declares stage `champion`: copies the drafter that serves, as the registry names it, into a refresh.

Its key is its content alone: the same champion is the same artifact, wherever its files lie. If the target has changed
since, the drafter is adopted for the new target: the refresh starts from it and has to beat it. The body is
`champion.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.stages.runtime.stage import Config, NotInKey, Stage

RECORD = "champion.json"


class ChampionConfig(Config):
    """A version of a drafter line."""

    line: Annotated[str, NotInKey()]
    version: Annotated[int, Field(ge=1), NotInKey()]
    folder: Annotated[str, Field(description="of the artifact, or of the uploaded drafter"), NotInKey()]
    content_id: Annotated[str, Field(description="of the artifact")]
    drafter_digest: Annotated[str, Field(description="of its checkpoint")]
    promoted_at: Annotated[str, NotInKey()] = ""
    figures: Annotated[dict[str, Any], NotInKey()] = Field(default={}, description="what it was worth at its promotion")

    def checkpoint(self) -> Path:
        """Return the folder of the checkpoint, in the store or as uploaded. Raises DraftsmithError if it is missing."""
        source = open_store(home()).localize(Path(self.folder))
        if not source.is_dir():
            raise DraftsmithError(
                f"{self.line} version {self.version}: its folder {source} is missing. Mount the store that it lies in, "
                "set registry.upload, or promote another version."
            )
        return source


STAGE = Stage(name="champion", config=ChampionConfig, inputs=("target",), body="draftsmith.stages.drafters.champion")
