"""What the files outside the store hold that stages read: a part of their keys."""

from __future__ import annotations

import logging

from draftsmith.artifacts.checksums import Checksums
from draftsmith.artifacts.home import home
from draftsmith.stages.contract import Config

log = logging.getLogger(__name__)
_MUCH = 20_000_000_000  # bytes, which even a fast disk takes some time to read


def external_digests(config: Config) -> dict[str, str]:
    """What a config's files outside the store hold: path -> sha256, or a version of what is far away."""
    checksums, files = Checksums(home()), config.external_files()
    if (unread := checksums.unread(files)) > _MUCH:
        log.warning(
            "reads %d GB (files outside the store, %d in all) for their checksums, maybe for minutes; what nobody "
            "touches is not read again for a week",
            unread // 10**9,
            len(files),
        )
    return {str(path): checksums.of(path) for path in files} | config.external_versions()
