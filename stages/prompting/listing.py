"""The config of stage `sources`: where prompts or logs are found, and their windows of time."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from draftsmith.stages.contract import Config, Listing
from draftsmith.stages.prompting.files import is_remote, listed_as, matched
from draftsmith.stages.prompting.times import absolute, is_relative


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

    def listing(self) -> Listing:
        if self._listing is not None:
            return self._listing
        now = datetime.now(UTC)
        files = sorted({listed_as(name) for name in matched(self.paths, self.field)})
        return Listing(files, {window: absolute(window, now) for window in self.windows})

    def external_versions(self) -> dict[str, str]:
        listing = self.listing()
        return dict.fromkeys(listing.files, "listed") | dict(listing.since)


def _is_looked_up(path: str) -> bool:
    return is_remote(path) or glob.has_magic(path) or Path(path.removeprefix("file://")).expanduser().is_dir()
