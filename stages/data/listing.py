"""Stage `sources`: lists the files that prompts or logs are read from, and where their windows of time begin.

The stage after it reads these files and no others: a run that goes on after an interruption reads the same ones, though
more have come.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from draftsmith.artifacts.atomic import write_text
from draftsmith.stages.data.row_files import is_remote, listed_as, matched
from draftsmith.stages.data.time_window import absolute, is_relative
from draftsmith.stages.runtime.stage import LISTING_FILE, SOURCES, Config, InputListing, Stage, StageContext


def run(ctx: StageContext, config: SourcesConfig) -> None:
    """Write `sources.json`: `files`, and `since` with the beginning of every window."""
    listing = config.list_inputs()
    write_text(ctx.out / LISTING_FILE, listing.to_json())
    ctx.summary(files=len(listing.files))


class SourcesConfig(Config):
    """What is listed."""

    paths: tuple[str, ...]  # files, folders, patterns and addresses
    field: str  # that names them, for errors
    windows: tuple[str, ...] = ()  # such as 7d

    @staticmethod
    def of(paths: Sequence[str], field: str, windows: Iterable[str | None]) -> SourcesConfig | None:
        """Return what lists them; None where they always mean the same files and the same times."""
        relative = tuple(sorted({each for each in windows if each is not None and is_relative(each)}))
        if not relative and not any(_is_looked_up(path) for path in paths):
            return None
        return SourcesConfig(paths=tuple(paths), field=field, windows=relative)

    def list_inputs(self) -> InputListing:
        if self._listing is not None:
            return self._listing
        now = datetime.now(UTC)
        files = sorted({listed_as(name) for name in matched(self.paths, self.field)})
        return InputListing(files, {window: absolute(window, now) for window in self.windows})

    def external_versions(self) -> dict[str, str]:
        listing = self.list_inputs()
        return dict.fromkeys(listing.files, "listed") | dict(listing.since)


def _is_looked_up(path: str) -> bool:
    return is_remote(path) or glob.has_magic(path) or Path(path.removeprefix("file://")).expanduser().is_dir()


STAGE = Stage(name=SOURCES, config=SourcesConfig, inputs=(), body=__name__)
