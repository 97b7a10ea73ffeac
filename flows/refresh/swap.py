"""Has servers draft with a version of a line, and records which server serves which version.

While a server serves a version, that has the tag `server.HOST:PORT`: since when, by which proof, after what pause.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.manifest import MANIFEST, read_manifest
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tracking.registry import Registry, Version
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.artifacts.tracking.terms import sanitize_key
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh.line import artifact_folder, drafter_checkpoint, find_artifact, registry
from draftsmith.stages.drafters.digest import drafter_digest, served_digest
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.servers.requirements import served_block_size, speculative_algorithm
from draftsmith.stages.engines.servers.state import NewDrafter, ServerState
from draftsmith.stages.engines.swap import Prove, Served, swap_servers

if TYPE_CHECKING:
    from draftsmith.stages.engines.swap_proof import ReplayProver

_TAG = "server."
_MOST_PROMPTS = 64


def served_by(version: Version) -> list[Served]:
    """Return the servers that serve a version, as its tags record them."""
    tags = version.tags.items()
    return [Served(**json.loads(value)) for name, value in tags if name.startswith(_TAG) and value]


def swap_to(version: Version, checkpoint: Path, urls: Sequence[str], say: Callable[[str], None]) -> None:
    """Have servers draft with a version, whose checkpoint is verified. A server that serves it already is left.

    say: takes a line for every server. Raises as `swap_servers` does.
    """
    algorithm = speculative_algorithm(checkpoint)
    new = NewDrafter(
        drafter_digest(checkpoint),
        checkpoint,
        algorithm,
        served_block_size(checkpoint, DraftingConfig(), algorithm),
        version.uploaded,
        Tracking(home()).uri,
    )
    lines = registry()
    make_prover = cache(lambda: _prover(lines, version, new))

    def prover(before: ServerState) -> Prove:
        return make_prover()(before)

    def done(served: Served) -> None:
        _record(lines, version, served)
        pause = f", after a pause of {served.pause_s:.2f} s" if served.pause_s else ""
        say(f"{served.url} drafts with {version} since {served.since}{pause}. {served.proof}")

    swap_servers(urls, new, prover, done)


def _prover(lines: Registry, version: Version, new: NewDrafter) -> ReplayProver:
    from draftsmith.stages.data.trajectories import load_trajectories
    from draftsmith.stages.engines.swap_proof import ReplayProver  # imports torch

    def folder_of(before: ServerState) -> Path:
        """Return the checkpoint of the drafter that a server serves: a version's, or the one it was started with."""
        assert before.digest is not None
        for other in lines.versions(version.line):
            if other.tags.get("drafter_digest") == before.digest:
                return drafter_checkpoint(other)
        if (started_with := Path(before.started_with)).is_dir() and served_digest(started_with) == before.digest:
            return started_with
        drafter = f"drafter {before.digest[:12] or 'of unknown content'}"
        raise DraftsmithError(
            f"{before.url}: the proof compares with its {drafter}, which is no version of {version.line} and not in "
            f"{started_with} here. Start the server with a version of the line once."
        )

    answers = load_trajectories(_input(version, "trajectories")).trajectories
    prompts = [each.tokens[: each.prompt_length] for each in answers[:_MOST_PROMPTS]]
    return ReplayProver(_input(version, "target"), new, folder_of, prompts)


def _input(version: Version, name: str) -> Path:
    """Return the artifact of an input that a version was trained with."""
    folder, store = artifact_folder(version), open_store(home())
    if (folder / MANIFEST).is_file() and (entry := read_manifest(folder).inputs.get(name)) is not None:
        store.localize(store.path(entry.stage, entry.key))  # fetches it if the store is a bucket
        if (found := find_artifact(entry, store)) is not None:
            return found
    raise DraftsmithError(f"{version}: its {name}, which the proof needs, is not in the store. Mount the store.")


def _record(lines: Registry, version: Version, served: Served) -> None:
    """Tag the version with a server that serves it, and no other version of the line."""
    name = _TAG + sanitize_key(served.url.partition("://")[2])
    for other in lines.versions(version.line):
        if other.number != version.number and other.tags.get(name):
            lines.tag(other, {name: ""})
    lines.tag(version, {name: json.dumps(asdict(served))})


def swap_in_run(version: Version, urls: Sequence[str]) -> str:
    """Swap servers as a task of the current Prefect run. Return what happened in words. Raises as `swap_to` does."""
    from draftsmith.flows.orchestration.flow_run import run_task  # imports Prefect, and planning must not

    def body() -> str:
        texts: list[str] = []
        swap_to(version, drafter_checkpoint(version), urls, texts.append)
        return "\n\n".join(texts)

    return run_task("swap", f"{version.line} swap", body, Display().line)
