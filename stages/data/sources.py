"""Stage `sources`: lists the files that prompts or logs are read from, and where their time windows begin.

The stages after it read these files and no others: a run that continues after an interruption reads the same files even
if more have arrived.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from draftsmith.artifacts.atomic import write_text
from draftsmith.stages.data.row_files import canonical_name, is_remote, match_files
from draftsmith.stages.data.time_window import is_relative, resolve_window
from draftsmith.stages.runtime.stage import LISTING_FILE, SOURCES, Config, InputListing, Stage, StageContext


def run(ctx: StageContext, config: SourcesConfig) -> None:
    """Write `sources.json`: `files`, and `since` with the beginning of every window."""
    listing = config.list_inputs()
    write_text(ctx.out / LISTING_FILE, listing.to_json())
    ctx.summary(files=len(listing.files))


class SourcesConfig(Config):
    """The paths and windows to list."""

    paths: tuple[str, ...]  # files, folders, patterns and addresses
    field: str  # the config field that names them, for errors
    windows: tuple[str, ...] = ()  # such as 7d

    @staticmethod
    def from_paths(paths: Sequence[str], field: str, windows: Iterable[str | None]) -> SourcesConfig | None:
        """Return the config that lists them; None if they mean the same files and times in every run."""
        relative = tuple(sorted({window for window in windows if window is not None and is_relative(window)}))
        if not relative and not any(_may_change(path) for path in paths):
            return None
        return SourcesConfig(paths=tuple(paths), field=field, windows=relative)

    def list_inputs(self) -> InputListing:
        if self._listing is not None:
            return self._listing
        now = datetime.now(UTC)
        files = sorted({canonical_name(name) for name in match_files(self.paths, self.field)})
        return InputListing(files, {window: resolve_window(window, now) for window in self.windows})

    def external_versions(self) -> dict[str, str]:
        listing = self.list_inputs()
        return dict.fromkeys(listing.files, "listed") | dict(listing.since)


def _may_change(path: str) -> bool:
    """Return whether the path may mean other files in another run."""
    return is_remote(path) or glob.has_magic(path) or Path(path.removeprefix("file://")).expanduser().is_dir()


STAGE = Stage(name=SOURCES, config=SourcesConfig, inputs=(), body="draftsmith.stages.data.sources")
