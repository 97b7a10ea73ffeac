"""Which store a home works with: its own folder, or the bucket that the environment names."""

from __future__ import annotations

import os
from pathlib import Path

from draftsmith.artifacts.store import Store

STORE = "DRAFTSMITH_STORE"  # of the environment: an address for fsspec, such as s3://bucket/prefix


def store_of(home: Path) -> Store:
    """`<home>/store`, or the bucket of `DRAFTSMITH_STORE` with its copies there.

    Raises DraftsmithError for an address that cannot be used.
    """
    address = os.environ.get(STORE)
    if not address:
        return Store(home / "store")
    from draftsmith.artifacts.bucket import Bucket
    from draftsmith.artifacts.remote_store import RemoteStore

    return RemoteStore(home / "store", Bucket(address, STORE))
