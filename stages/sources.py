"""Stage `sources`: lists the files that prompts or logs are read from, and where their windows of time begin.

The stage after it reads these files and no others: a run that goes on after an interruption reads the same ones, though
more have come.
"""

from __future__ import annotations

from draftsmith.artifacts.atomic import write_text
from draftsmith.stages.contract import LISTING, SOURCES, Stage, StageContext
from draftsmith.stages.prompting.listing import SourcesConfig


def run(ctx: StageContext, config: SourcesConfig) -> None:
    """Write `sources.json`: `files`, and `since` with the beginning of every window."""
    listing = config.listing()
    write_text(ctx.out / LISTING, listing.text())
    ctx.summary(files=len(listing.files))


STAGE = Stage(name=SOURCES, config=SourcesConfig, inputs=(), run=run)
