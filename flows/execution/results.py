"""Artifacts of a run by node. From a remote store, one is downloaded when it is first read."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping
from pathlib import Path

from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import ArtifactRef


class LazyArtifacts(Mapping[str, ArtifactRef]):
    """Artifacts by node. Looking one up downloads its files."""

    def __init__(self, store: Store, refs: Mapping[str, ArtifactRef]) -> None:
        self._store, self._refs = store, refs

    def __getitem__(self, node: str) -> ArtifactRef:
        ref = self._refs[node]
        self._store.fetch(ref)
        return ref

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __contains__(self, node: object) -> bool:
        return node in self._refs


class ArtifactFolders(Mapping[str, Path]):
    """Folders of artifacts by node. `items` downloads nothing: a folder may hold the manifest alone."""

    def __init__(self, store: Store, refs: Mapping[str, ArtifactRef]) -> None:
        self._refs, self._artifacts = refs, LazyArtifacts(store, refs)

    def __getitem__(self, node: str) -> Path:
        return self._artifacts[node].path

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __contains__(self, node: object) -> bool:
        return node in self._refs

    def items(self) -> ItemsView[str, Path]:
        return {name: ref.path for name, ref in self._refs.items()}.items()
