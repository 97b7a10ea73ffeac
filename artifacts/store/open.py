"""Which store a home works with: its own folder, mirrored in a bucket if the environment names one."""

from __future__ import annotations

import os
from pathlib import Path

from draftsmith.artifacts.store.local import Store

STORE = "DRAFTSMITH_STORE"  # of the environment: an address for fsspec, such as s3://bucket/prefix


def store_of(home: Path) -> Store:
    """`<home>/store`, mirrored in the bucket of `DRAFTSMITH_STORE` if there is one.

    Raises DraftsmithError for an address that cannot be used.
    """
    address = os.environ.get(STORE)
    if not address:
        return Store(home / "store")
    from draftsmith.artifacts.store.bucket import Bucket
    from draftsmith.artifacts.store.mirror import MirroredStore

    return MirroredStore(home / "store", Bucket(address, STORE))
