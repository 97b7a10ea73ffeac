"""What a stage reads is what its key says, before it begins and when it has ended; else nothing of it is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.artifacts.store import Claim, Store
from draftsmith.flows.pipeline.external import external_digests
from draftsmith.flows.pipeline.graph import Node, Pipeline, key_of


@dataclass(frozen=True)
class Code:
    """What a stage is run with, for its manifest: that of a moment, while its source may be edited any time."""

    digest: str
    modules: Mapping[str, str]


def code_of(
    node: Node,
    inputs: Mapping[str, ArtifactRef],
    seed: int,
    pipeline: Pipeline,
    external: Mapping[str, str],
    key: str,
) -> Code:
    """Of a stage that begins now. Raises RetryableError if it is not the code that the key was made of: a stage may
    wait for its turn for hours, and a shard be made on another host."""
    code = Code(pipeline.code_digest(node.module), pipeline.code_modules(node.module))
    if key_of(node, inputs, seed, pipeline, external) != key:
        raise RetryableError(
            f"{node.name}: the code here (or a file that it reads) is not that of its key: it was changed while the "
            "stage waited for its turn, or this host has another version: run the same command again, with the same "
            "version everywhere"
        )
    return code


@contextmanager
def unchanged(
    store: Store, node: Node, inputs: Mapping[str, ArtifactRef], claim: Claim, external: Mapping[str, str]
) -> Iterator[None]:
    """Around a stage. Raises DraftsmithError before the body if an input is damaged or a file is not that of the key
    (`external`), and after it, however it ended, if one has become so: then what the attempt left is discarded too."""
    _check_current(store, node, inputs, external)
    _check_whole(store, node, inputs, read=False)
    try:
        yield
    except Exception:
        # what cannot be asked now hides no error of the stage
        with suppress(RetryableError), _discarding(store, claim):
            _check_read(store, node, inputs, external)
        raise
    with _discarding(store, claim):
        _check_read(store, node, inputs, external)


@contextmanager
def _discarding(store: Store, claim: Claim) -> Iterator[None]:
    try:
        yield
    except RetryableError:  # a bucket that does not answer says nothing of what was read: the attempt is kept
        raise
    except DraftsmithError:
        store.discard(claim)
        raise


def _check_read(store: Store, node: Node, inputs: Mapping[str, ArtifactRef], external: Mapping[str, str]) -> None:
    _check_whole(store, node, inputs, read=True)  # first: it asks nobody
    _check_current(store, node, inputs, external)


def _check_current(store: Store, node: Node, inputs: Mapping[str, ArtifactRef], external: Mapping[str, str]) -> None:
    """Inputs and files are those of the key."""
    for name, ref in inputs.items():
        now = store.manifest_at(ref.stage, ref.key)
        if now is not None and now.content_id != ref.content_id:  # another run made it again, with `--force`
            raise DraftsmithError(
                f"{node.name}: its input {name} ({ref.path}) was made again by another run, with other content: run "
                "the same command again, which then starts from the new one"
            )
    found = external_digests(node.config.reading(external))  # what has come meanwhile is not read
    if changed := [path for path in sorted({*found, *external}) if found.get(path) != external.get(path)]:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise DraftsmithError(
            f"{node.name}: {changed[0]}{more} changed while it was read: nothing of it was kept; run the same command "
            "again, which then starts from what is there"
        )


def _check_whole(store: Store, node: Node, inputs: Mapping[str, ArtifactRef], *, read: bool) -> None:
    """Inputs are as they were written. read: by the stage, so that a copy which is damaged is none to mend."""
    for name, ref in inputs.items():
        try:
            if not read:
                store.fetch(ref)
            store.verify_once(ref, read=read)
        except DraftsmithError as error:
            hint = _node(node, name, ref) if "--force" in str(error) else ""
            raise type(error)(f"{node.name}: its input {name}: {error}{hint}") from error


def _node(node: Node, name: str, ref: ArtifactRef) -> str:
    """The remedy names the stage; this, the node that made the input, where that is called otherwise."""
    source = node.inputs[name]
    alone = f"`draftsmith stage {source} CONFIG --force` makes it alone"
    return f" (here it is node {source}: {alone})" if source != ref.stage else f" ({alone})"
