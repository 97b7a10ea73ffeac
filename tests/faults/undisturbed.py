"""The refresh that nothing disturbs: its content ids and times, and a copy of its home that every scene begins from."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from draftsmith.artifacts.store.local import SHORT
from tests.faults import configs, served
from tests.faults.home import Ended, Home, Running, copied
from tests.faults.watch import Watch

# What shows the seconds that the evaluation has measured, which are no content of it: made again where it is, and its
# own content may differ between two undisturbed refreshes.
MEASURES = "evaluation"
TIMED = ("gate", "report")


@dataclass(frozen=True)
class NodeTimes:
    """Of a node's stage process, seconds."""

    artifact: str  # STAGE/KEY
    starting_s: float  # from its start to the first file that it wrote
    working_s: float  # from there to its end


@dataclass(frozen=True)
class Undisturbed:
    """How a refresh goes when nothing happens to it."""

    kind: str
    config: str  # its file's name
    folder: Path  # of scenes: homes hold absolute paths, so every scene is played in the same place
    kept: Path  # a copy of `folder` as it was afterwards
    content_ids: dict[str, str]
    nodes: dict[str, NodeTimes]
    code: int  # 3 where the gate refused
    seconds: float
    versions: list[list[str]] = field(default_factory=list)  # of the line: each one's number and aliases

    @property
    def home(self) -> Home:
        return Home(self.folder, self.folder / self.config)

    def without(self, *nodes: str) -> Home:
        """The home afterwards, but these nodes were never made. What depends on them is there: made again with the same
        content, they lead to the same artifacts, and with any other content they do not."""
        copied(self.kept, self.folder)
        for node in nodes:
            self.home.drop(self.nodes[node].artifact)
        return self.home


def undisturbed(kind: str, folder: Path) -> Undisturbed:
    """From an earlier call with the same folder and code, or made: `folder/KIND/scene` and `folder/KIND/kept`."""
    plain = undisturbed(configs.PLAIN, folder) if kind == configs.LINE else None
    folder = folder / kind
    told = folder / "undisturbed.json"
    if not told.exists() or not _is_current(_read(told)):
        shutil.rmtree(folder, ignore_errors=True)
        made = _refresh_once(kind, folder) if plain is None else _refresh_line(folder, plain)
        told.write_text(json.dumps(asdict(made), indent=2, default=str), "utf-8")
    return _read(told)


def _read(told: Path) -> Undisturbed:
    read = json.loads(told.read_text("utf-8"))
    nodes = {name: NodeTimes(**times) for name, times in read.pop("nodes").items()}
    return Undisturbed(**{**read, "folder": Path(read["folder"]), "kept": Path(read["kept"])}, nodes=nodes)


def _is_current(made: Undisturbed) -> bool:
    """Whether the code as it is would make the same artifacts."""
    planned = made.without().refresh("--plan", *arguments(made.kind, made.folder)).out.splitlines()
    remarks = ("warning: ", "not checked: ")
    rows = [line.split() for line in planned[2:] if not line.startswith(remarks)]  # node, stage, key, what happens
    return bool(rows) and all(row[3:] == ["reused"] for row in rows)


def _refresh_once(kind: str, folder: Path) -> Undisturbed:
    scene, kept = folder / "scene", folder / "kept"
    home = Home(scene, configs.write(kind, scene))
    ended, nodes = watched(home, home.start(*arguments(kind, scene)))
    copied(scene, kept)
    return Undisturbed(kind, home.config.name, scene, kept, home.content_ids(), nodes, ended.code, ended.seconds)


def _refresh_line(folder: Path, plain: Undisturbed) -> Undisturbed:
    """The second refresh of a line, its registry as it was before it began: it can be played again. The target's
    answers in `plain` are its logs."""
    scene, kept = folder / "scene", folder / "kept"
    answers = plain.without().folder_of(plain.nodes["rollout"].artifact) / "trajectories.parquet"
    home = Home(scene, configs.write(configs.LINE, scene, answers))
    copied(plain.home.path / "store", home.path / "store")  # target, prompts and held-out answers are the same
    _well(home.refresh())
    before = folder / "before"
    copied(scene, before)
    ended, nodes = watched(home, home.start(*arguments(configs.LINE, scene)))
    copied(scene, kept)
    for name in ("mlflow.db", "mlflow.db-wal", "mlflow.db-shm", "mlartifacts"):
        _replace(before / "home" / name, kept / "home" / name)
    versions = home.versions()
    return Undisturbed(
        configs.LINE, home.config.name, scene, kept, home.content_ids(), nodes, ended.code, ended.seconds, versions
    )


def _replace(source: Path, place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    if source.exists():
        (shutil.copytree if source.is_dir() else shutil.copy)(source, place)


def remembered(folder: Path, config: str, told: str, kept: Path, starting_s: float = 3.0) -> Undisturbed:
    """Of a refresh that has ended before in `folder`, which is copied to `kept`. told: what it printed."""
    copied(folder, kept)
    home = Home(folder, folder / config)
    requests = sorted(home.path.glob("logs/*.request.json"), key=lambda path: path.stat().st_mtime_ns)
    made = ("/".join(path.name.split("-")[:2]) for path in requests)
    seconds = {f"{m.stage}/{m.key[:SHORT]}": m.duration_s for m in home.store.list()}
    nodes = {
        node: NodeTimes(artifact, starting_s, max(0.5, seconds[artifact] - starting_s))
        for node, artifact in zip(Ended(0, told, "", 0).nodes("done"), made, strict=False)
    }
    return Undisturbed(configs.PLAIN, config, folder, kept, home.content_ids(), nodes, 0, sum(seconds.values()))


def arguments(kind: str, folder: Path) -> list[str]:
    """Of the command, beside the config. Where a server answers, nothing else is looked at."""
    return [*served.urls(folder.parent), "--until", "rollout"] if kind == configs.SERVED else []


def watched(home: Home, running: Running) -> tuple[Ended, dict[str, NodeTimes]]:
    """Follow the command's stages to its end; the times of each, by node."""
    times: list[NodeTimes] = []
    while running.process.poll() is None:
        stage = Watch(home, running).stage()
        if stage is None:
            break
        begun = time.monotonic()
        stage.wait_until_working()
        working = time.monotonic()
        stage.wait_until_ended()
        times.append(NodeTimes(stage.artifact, working - begun, time.monotonic() - working))
    ended = _well(running.wait())
    return ended, dict(zip(ended.nodes("done"), times, strict=True))


def _well(ended: Ended) -> Ended:
    assert ended.code in (0, 3), f"an undisturbed refresh ended with {ended.code}: {ended.err or ended.out}"
    return ended
