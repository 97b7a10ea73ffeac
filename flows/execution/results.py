"""What a run has made, for whoever reads it: an artifact is fetched when it is asked for, if the store is far away."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping
from pathlib import Path

from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import ArtifactRef


class LazyArtifacts(Mapping[str, ArtifactRef]):
    """Artifacts by node, each whole when it is taken by its name."""

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
    """The same as folders. `items` fetches nothing: of what nobody has read, a folder may have its manifest alone."""

    def __init__(self, store: Store, refs: Mapping[str, ArtifactRef]) -> None:
        self._refs, self._whole = refs, LazyArtifacts(store, refs)

    def __getitem__(self, node: str) -> Path:
        return self._whole[node].path

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __contains__(self, node: object) -> bool:
        return node in self._refs

    def items(self) -> ItemsView[str, Path]:
        return {name: ref.path for name, ref in self._refs.items()}.items()
