"""The undisturbed refresh: its content ids and times, and a copy of its home from which every scene starts."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from draftsmith.artifacts.store.local import SHORT
from draftsmith.stages.runtime.stage import INCONCLUSIVE
from tests.faults import configs
from tests.faults.home import Ended, Home, Running, copied
from tests.faults.proxy import proxy
from tests.faults.watch import next_stage

# They show durations, which are not part of the evaluation's content. They are made again whenever it is, and their
# content may differ between two undisturbed refreshes.
MEASURES = "evaluation"
TIMED = ("gate", "report")


@dataclass(frozen=True)
class NodeTimes:
    """Durations of a node's stage process, in seconds."""

    artifact: str  # STAGE/KEY
    starting_s: float  # from the start to the first file that it writes
    working_s: float  # from that file to the end


@dataclass(frozen=True)
class Undisturbed:
    """The record of an undisturbed refresh."""

    kind: str
    config: str  # its file's name
    folder: Path  # of scenes: homes hold absolute paths, so every scene is played in the same place
    kept: Path  # a copy of `folder` after the refresh
    content_ids: dict[str, str]
    nodes: dict[str, NodeTimes]
    code: int  # 3 where the gate refused
    seconds: float
    versions: list[list[str]] = field(default_factory=list)  # of the line: each one's number and aliases

    @property
    def home(self) -> Home:
        return Home(self.folder, self.folder / self.config)

    def without(self, *nodes: str) -> Home:
        """Restore the home without the artifacts of these nodes, and return it.

        What depends on them stays: made again with the same content they lead to the same artifacts, with any other
        content they do not.
        """
        copied(self.kept, self.folder)
        for node in nodes:
            self.home.drop(self.nodes[node].artifact)
        return self.home


def undisturbed(kind: str, folder: Path) -> Undisturbed:
    """Return the record of a refresh, from an earlier call with this folder and code if there was one.

    Its files are in `folder/KIND/scene` and `folder/KIND/kept`.
    """
    plain = undisturbed(configs.PLAIN, folder) if kind == configs.LINE else None
    folder = folder / kind
    record = folder / "undisturbed.json"
    if not record.exists() or not _is_current(_read(record)):
        shutil.rmtree(folder, ignore_errors=True)
        made = _refresh_once(kind, folder) if plain is None else _refresh_line(folder, plain)
        record.write_text(json.dumps(asdict(made), indent=2, default=str), "utf-8")
    return _read(record)


def _read(path: Path) -> Undisturbed:
    fields = json.loads(path.read_text("utf-8"))
    nodes = {name: NodeTimes(**times) for name, times in fields.pop("nodes").items()}
    return Undisturbed(**{**fields, "folder": Path(fields["folder"]), "kept": Path(fields["kept"])}, nodes=nodes)


def _is_current(made: Undisturbed) -> bool:
    """Return whether the current code would make the same artifacts."""
    planned = made.without().refresh("--plan", *arguments(made.kind, made.folder)).out.splitlines()
    remarks = ("warning: ", "not checked: ")
    rows = [line.split() for line in planned[2:] if not line.startswith(remarks)]  # node, stage, key, what happens
    return bool(rows) and all(row[3:] == ["reused"] for row in rows)


def _refresh_once(kind: str, folder: Path) -> Undisturbed:
    scene, kept = folder / "scene", folder / "kept"
    home = Home(scene, configs.write(kind, scene))
    ended, nodes = _decided(kind, home, folder / "before")
    copied(scene, kept)
    return Undisturbed(kind, home.config.name, scene, kept, home.content_ids(), nodes, ended.code, ended.seconds)


def _refresh_line(folder: Path, plain: Undisturbed) -> Undisturbed:
    """Run the second refresh of a line. Its registry is restored afterwards, so that it can be played again.

    Its logs are the target's answers in `plain`.
    """
    scene, kept = folder / "scene", folder / "kept"
    answers = plain.without().folder_of(plain.nodes["rollout"].artifact) / "trajectories.parquet"
    home = Home(scene, configs.write(configs.LINE, scene, answers))
    copied(plain.home.path / "store", home.path / "store")  # target, prompts and held-out answers are the same
    _well(home.refresh())
    before = folder / "before"
    ended, nodes = _decided(configs.LINE, home, before)
    copied(scene, kept)
    for name in ("mlflow.db", "mlflow.db-wal", "mlflow.db-shm", "mlartifacts"):
        _replace(before / "home" / name, kept / "home" / name)
    versions = home.versions()
    return Undisturbed(
        configs.LINE, home.config.name, scene, kept, home.content_ids(), nodes, ended.code, ended.seconds, versions
    )


def _decided(kind: str, home: Home, before: Path) -> tuple[Ended, dict[str, NodeTimes]]:
    """Copy the home to `before` and run the refresh, again if load made its evaluation inconclusive.

    An inconclusive evaluation is made again by every later command, which then repeats more than the node that was hit.
    """
    copied(home.folder, before)
    for _ in range(3):
        # with its own Prefect server, whose database faults damage
        ended, nodes = watched(home, home.start(*arguments(kind, home.folder), PREFECT_API_URL=""))
        if not any(made.metrics.get(INCONCLUSIVE) for made in home.store.list()):
            return ended, nodes
        copied(before, home.folder)
    raise AssertionError("the undisturbed refresh measures no speeds. Play the faults on a quieter machine.")


def _replace(source: Path, path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if source.exists():
        (shutil.copytree if source.is_dir() else shutil.copy)(source, path)


def remembered(folder: Path, config: str, output: str, kept: Path, starting_s: float = 3.0) -> Undisturbed:
    """Return the record of a refresh that has ended in `folder`, which is copied to `kept`. output: its stdout."""
    copied(folder, kept)
    home = Home(folder, folder / config)
    requests = sorted(home.path.glob("logs/*.request.json"), key=lambda path: path.stat().st_mtime_ns)
    made = ("/".join(path.name.split("-")[:2]) for path in requests)
    seconds = {f"{m.stage}/{m.key[:SHORT]}": m.duration_s for m in home.store.list()}
    nodes = {
        node: NodeTimes(artifact, starting_s, max(0.5, seconds[artifact] - starting_s))
        for node, artifact in zip(Ended(0, output, "", 0).nodes("done"), made, strict=False)
    }
    ids, total = home.content_ids(), sum(seconds.values())
    return Undisturbed(configs.PLAIN, config, folder, kept, ids, nodes, 0, total, home.versions())


def arguments(kind: str, folder: Path) -> list[str]:
    """Return the command's arguments after the config. With a server, only the rollout is made."""
    if kind != configs.SERVED:
        return []
    return ["--set", f"rollout.engine.urls=[{proxy(folder.parent).url}]", "--until", "rollout"]


def watched(home: Home, running: Running) -> tuple[Ended, dict[str, NodeTimes]]:
    """Follow the command's stages to its end. Return the durations of each, by node."""
    times: list[NodeTimes] = []
    while running.process.poll() is None:
        stage = next_stage(home, running)
        if stage is None:
            break
        started = time.monotonic()
        stage.wait_until_working()
        working = time.monotonic()
        stage.wait_until_ended()
        times.append(NodeTimes(stage.artifact, working - started, time.monotonic() - working))
    ended = _well(running.wait())
    return ended, dict(zip(ended.nodes("done"), times, strict=True))


def _well(ended: Ended) -> Ended:
    assert ended.code in (0, 3), f"an undisturbed refresh ended with {ended.code}: {ended.err or ended.out}"
    return ended
