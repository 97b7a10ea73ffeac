"""Guards round a stage: what it reads is what its key was made of, before it begins and when it has ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.store.local import Claim, Store
from draftsmith.artifacts.store.manifest import ArtifactRef
from draftsmith.flows.planning.graph import Node, Pipeline, cache_key
from draftsmith.flows.planning.inputs import external_digests


def snapshot_code(
    node: Node,
    inputs: Mapping[str, ArtifactRef],
    seed: int,
    pipeline: Pipeline,
    external: Mapping[str, str],
    key: str,
) -> tuple[str, Mapping[str, str]]:
    """Return digest and modules of the code that a stage begins with, for its manifest. Raises RetryableError if it is
    not the code that the key was made of: a stage may wait for hours, and a shard be made on another host."""
    code = pipeline.code_digest(node.module), pipeline.code_modules(node.module)
    if cache_key(node, inputs, seed, pipeline, external) != key:
        raise RetryableError(
            f"{node.name}: the code here (or a file that it reads) is not that of its key: it was changed while the "
            "stage waited for its turn, or this host has another version: run the same command again, with the same "
            "version everywhere"
        )
    return code


@contextmanager
def inputs_unchanged(
    store: Store, node: Node, inputs: Mapping[str, ArtifactRef], claim: Claim, external: Mapping[str, str]
) -> Iterator[None]:
    """Around a stage. Raises DraftsmithError before the body if an input is damaged or a file is not that of the key
    (`external`), and after it, however it ended, if one has become so: then what the attempt left is discarded too."""
    _check(store, node, inputs, external, read=False)
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    try:
        _check(store, node, inputs, external, read=True)
    except RetryableError:  # a bucket that does not answer says nothing of what was read, and hides no other error
        if failed is None:
            raise
    except DraftsmithError:
        store.discard(claim)
        raise
    if failed is not None:
        raise failed


def _check(
    store: Store, node: Node, inputs: Mapping[str, ArtifactRef], external: Mapping[str, str], *, read: bool
) -> None:
    """Compare inputs and files with the key. read: by the stage, so that a damaged copy cannot be mended any more."""
    if not read:
        _check_content(store, node, inputs)
    for name, ref in inputs.items():
        try:
            if not read:
                store.fetch(ref)
            store.verify_once(ref, read=read)
        except DraftsmithError as error:
            alone = f" (`draftsmith stage {node.inputs[name]} CONFIG --force` makes it alone)"
            hint = alone if "--force" in str(error) else ""
            raise type(error)(f"{node.name}: its input {name}: {error}{hint}") from error
    if read:  # after what asks no bucket
        _check_content(store, node, inputs)
    found = external_digests(node.config)  # of listed files those of the listing: what has come meanwhile is not read
    if changed := [path for path in sorted({*found, *external}) if found.get(path) != external.get(path)]:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise DraftsmithError(
            f"{node.name}: {changed[0]}{more} changed while it was read: nothing of it was kept; run the same command "
            "again, which then starts from what is there"
        )


def _check_content(store: Store, node: Node, inputs: Mapping[str, ArtifactRef]) -> None:
    for name, ref in inputs.items():
        now = store.manifest_at(ref.stage, ref.key)
        if now is not None and now.content_id != ref.content_id:
            raise DraftsmithError(
                f"{node.name}: its input {name} ({ref.path}) was made again by another run, with other content: run "
                "the same command again, which then starts from the new one"
            )
