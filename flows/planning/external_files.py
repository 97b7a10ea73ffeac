"""The checksums of the files outside the store that stages read. They are part of cache keys."""

from __future__ import annotations

import logging

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.checksums import Checksums
from draftsmith.stages.runtime.stage import Config

log = logging.getLogger(__name__)
_MANY_BYTES = 20_000_000_000  # even a fast disk takes some time to read them


def external_digests(config: Config) -> dict[str, str]:
    """Return the files that a config reads outside the store: path -> sha256, or the version of a remote file.

    The result also has the beginnings of a pinned listing's windows. Raises DraftsmithError if a listed file is gone.
    """
    checksums, files = Checksums(home()), config.external_files()
    if (unread := checksums.uncached_bytes(files)) > _MANY_BYTES:
        log.warning(
            "Reading %d GB for the checksums of %d files outside the store, maybe for minutes. Unchanged files are not "
            "read again for a week.",
            unread // 10**9,
            len(files),
        )
    digests = {str(path): checksums.sha256(path) for path in files} | config.external_versions()
    if gone := sorted((config.pinned_files or frozenset()) - digests.keys()):
        raise DraftsmithError(
            f"{gone[0]} (and {len(gone) - 1} more) was there when the run began and is gone. Put it back, or run the "
            "same command again to read what is there now."
        )
    return digests | (dict(config.listing.since) if config.listing is not None else {})
