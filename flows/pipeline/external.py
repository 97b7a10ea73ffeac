"""What the files outside the store hold that stages read: a part of their keys."""

from __future__ import annotations

from draftsmith.artifacts.checksums import Checksums
from draftsmith.artifacts.home import home
from draftsmith.stages.contract import Config


def external_digests(config: Config) -> dict[str, str]:
    """What a config's files outside the store hold: path -> sha256, or a version of what is far away."""
    checksums = Checksums(home())
    return {str(path): checksums.of(path) for path in config.external_files()} | config.external_versions()
