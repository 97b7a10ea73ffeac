"""Has servers draft with a version of a line, and records which server serves which version.

A version has the tag `server.HOST:PORT` while that server serves it: since when, by which proof, after what pause.
Anyone who may write tags could name any server there, so a server that only a tag names gets no API key.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.manifest import MANIFEST, read_manifest
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tracking.registry import ROLLED_BACK, Registry, Version
from draftsmith.artifacts.tracking.terms import sanitize_key
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh.versions import artifact_folder, drafter_checkpoint, find_artifact, registry
from draftsmith.stages.drafters.digest import drafter_digest, served_digest
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.servers.requirements import served_block_size, speculative_algorithm
from draftsmith.stages.engines.servers.state import NewDrafter, ServerState
from draftsmith.stages.engines.swap import Served, Swap

log = logging.getLogger(__name__)

_TAG = "server."
_SERVED = TypeAdapter(Served)  # a later release may have stored more
_MOST_PROMPTS = 64


def served_by(version: Version) -> list[Served]:
    """Return the servers that serve a version, as its tags record them. A tag that cannot be read is reported."""
    served = []
    for name, value in version.tags.items():
        if name.startswith(_TAG) and value:
            try:
                served.append(_SERVED.validate_json(value))
            except ValidationError as error:
                reason = error.errors(include_url=False, include_input=False)[0]["msg"]
                log.warning("%s: its tag draftsmith.%s is ignored: %s", version, name, reason)
    return served


def swapped_servers(line: str) -> list[str]:
    """Return the servers that a version of the line was swapped into."""
    urls = [served.url for version in registry().versions(line) for served in served_by(version)]
    return list(dict.fromkeys(urls))


def forget(line: str, url: str) -> bool:
    """Remove a server from the versions of a line. Return whether one named it."""
    lines, name = registry(), _tag_name(url)
    versions = [version for version in lines.versions(line) if version.tags.get(name)]
    for version in versions:
        lines.tag(version, {name: ""})
    return bool(versions)


def _tag_name(url: str) -> str:
    return _TAG + sanitize_key(url.partition("://")[2])


def swap_to(
    version: Version, checkpoint: Path, urls: Sequence[str], say: Callable[[str], None], *, named: bool
) -> None:
    """Have servers draft with a version. A server that serves it already is left alone.

    A version that a rollback made the champion is written into all servers that answer, and proven afterwards.

    say: called with a line for every server. named: the config or the command line names these servers.
    Raises DraftsmithError if the checkpoint is not the registered drafter, and as `Swap` does.
    """
    lines, new = registry(), _drafter(version, checkpoint)
    if (registered := version.tags.get("drafter_digest", new.digest)) != new.digest:
        raise DraftsmithError(
            f"{version}: {checkpoint} is not the drafter that was registered: its digest is {new.digest[:12]}, not "
            f"{registered[:12]}. Restore it from a backup, or roll the line back."
        )

    def version_of(digest: str | None) -> Version | None:
        versions = lines.versions(version.line)
        return next((known for known in versions if known.tags.get("drafter_digest") == digest), None)

    def served_drafter(before: ServerState) -> NewDrafter:
        """Return the drafter that a server serves: a version's, or the one that it was started with."""
        assert before.digest is not None
        if (other := version_of(before.digest)) is not None:
            return _drafter(other, drafter_checkpoint(other), before.digest)
        if (started_with := Path(before.started_with)).is_dir() and served_digest(started_with) == before.digest:
            return NewDrafter(before.digest, started_with, new.algorithm, new.block_size)
        drafter = f"drafter {before.digest[:12] or 'of unknown content'}"
        raise DraftsmithError(
            f"{before.url}: the proof compares with its {drafter}, which is no version of {version.line} and not in "
            f"{started_with} here. Start the server with a version of the line once."
        )

    def recorded(state: ServerState) -> str | None:
        """Return this registry's proof of what a server has served since the time that it reports."""
        records = [served for served in served_by(version) if (served.url, served.since) == (state.url, state.since)]
        return next((served.proof for served in records if served.proof), None)

    def done(served: Served) -> None:
        if served.drafter == new.digest:
            _record(lines, version, served)
            pause = f", after a pause of {served.pause_s:.2f} s" if served.pause_s else ""
            say(f"{served.url} drafts with {version} since {served.since}{pause}. {served.proof or 'Not proven yet.'}")
        elif (old := version_of(served.drafter)) is not None:  # it was written back
            _record(lines, old, served)

    from draftsmith.stages.engines.swap_proof import ReplayProver  # imports torch

    prover = ReplayProver(new, served_drafter, lambda: _proof_inputs(lines, version), named=named)
    swap = Swap(new, prover, recorded, done, named)
    events = lines.events(version.line)
    rolled_back = bool(events) and (events[-1].what, events[-1].version) == (ROLLED_BACK, version.number)
    (swap.roll_back if rolled_back else swap.swap)(urls)


def _drafter(version: Version, checkpoint: Path, digest: str = "") -> NewDrafter:
    """Return a version's drafter. digest: the checkpoint's; without it the checkpoint is read."""
    algorithm = speculative_algorithm(checkpoint)
    return NewDrafter(
        digest or drafter_digest(checkpoint),
        checkpoint,
        algorithm,
        served_block_size(checkpoint, DraftingConfig(), algorithm),
        version.uploaded,
    )


def _proof_inputs(lines: Registry, version: Version) -> tuple[Path, list[list[int]]]:
    """Return the target and prompts that a version was trained with, or another version of the same target."""
    from draftsmith.stages.data.trajectories import load_trajectories  # imports torch

    target = version.tags.get("target_digest")
    others = [v for v in reversed(lines.versions(version.line)) if target and v.tags.get("target_digest") == target]
    for trained in (version, *others):
        try:
            folder, answers = (_input(trained, name) for name in ("target", "trajectories"))
        except RetryableError:
            raise
        except DraftsmithError:
            continue
        trajectories = load_trajectories(answers).trajectories
        return folder, [answer.tokens[: answer.prompt_length] for answer in trajectories[:_MOST_PROMPTS]]
    raise DraftsmithError(f"{version}: its target and answers, which the proof needs, are not in the store. Mount it.")


def _input(version: Version, name: str) -> Path:
    """Return the artifact of an input that a version was trained with."""
    folder, store = artifact_folder(version), open_store(home())
    if (folder / MANIFEST).is_file() and (entry := read_manifest(folder).inputs.get(name)) is not None:
        store.localize(store.path(entry.stage, entry.key))  # fetches it if the store is a bucket
        if (source := find_artifact(entry, store)) is not None:
            return source
    raise DraftsmithError(f"{version}: its {name} is not in the store. Mount the store.")


def _record(lines: Registry, version: Version, served: Served) -> None:
    """Tag the version with a server that serves it, and remove that tag from the line's other versions."""
    name = _tag_name(served.url)
    for other in lines.versions(version.line):
        if other.number != version.number and other.tags.get(name):
            lines.tag(other, {name: ""})
    lines.tag(version, {name: json.dumps(asdict(served))})


def swap_in_run(version: Version, urls: Sequence[str]) -> str:
    """Swap the config's servers as a task of the current Prefect run. Return what happened in words.

    Raises as `swap_to` does.
    """
    from draftsmith.flows.orchestration.flow_run import run_task  # imports Prefect, and planning must not

    def body() -> str:
        texts: list[str] = []
        swap_to(version, drafter_checkpoint(version), urls, texts.append, named=True)
        return "\n\n".join(texts)

    return run_task("swap", f"{version.line} swap", body, Display().line)
