"""Files that a disk has damaged: a flipped bit, a lost end; in artifacts, in unfinished work, in databases.

And files outside the store that somebody changes while a stage reads them.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

from tests.faults.home import Ended, Home
from tests.faults.scene import STARTING, WORKING, Play, Scene, Strike, TooLate, must
from tests.faults.undisturbed import TIMED
from tests.faults.watch import until

READER = {
    "target": "prompts", "prompts": "rollout", "rollout": "sft", "heldout": "evaluation", "sft": "assisted",
    "assisted": "mining", "mining": "report", "opd": "evaluation", "control": "evaluation", "evaluation": "report",
    "champion": "drift", "drift": "report", "earlier": "logs", "logs": "mining", "gate": "report",
}  # fmt: skip
"""node -> a node that reads its artifact. The report is read by the run itself."""
_DAMAGED = (*READER, "report")
SAVING = ("heldout", "rollout", "sft", "assisted", "opd", "control")
"""Nodes that save parts of their work in separate files."""
READ_BY = {"prompts": "prompts.jsonl", "logs": "answers.jsonl"}
"""Nodes that read files outside the store."""
Damage = Callable[[Path, random.Random], None]


def flip(path: Path, chance: random.Random) -> None:
    """Flip one random bit."""
    content = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    _rewrite(path, bytes(content))


def truncate(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    _rewrite(path, content[: chance.randrange(len(content))])


def _rewrite(path: Path, content: bytes) -> None:
    """Rewrite a file in place. It keeps its inode and its time of change, as on a failing disk."""
    times = path.stat()
    path.chmod(0o644)
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def artifact_file(suffix: str, damage: Damage) -> Play:
    """Damage a file of the node's artifact; check that its reader names it, and the `--force` that repairs it."""

    def play(scene: Scene) -> None:
        reader = READER.get(scene.node)
        home = scene.undisturbed.without(*([reader] if reader else []))
        folder = home.folder_of(scene.artifact)
        path = scene.chance.choice(sorted(p for p in folder.rglob(f"*{suffix}") if p.is_file() and p.stat().st_size))
        damage(path, scene.chance)
        scene.point = str(path.relative_to(folder))
        scene.check_end(home.refresh(*scene.arguments), [2], path.name)
        must(f"--force {scene.node}" in scene.messages[-1], "the message does not name the node to --force")
        scene.nothing_left()
        ended = home.refresh(*scene.arguments, "--force", scene.node)
        must(
            ended.code == scene.undisturbed.code,
            f"with --force it ended with {ended.code}: {ended.message or ended.err}",
        )
        scene.same_content()
        again = set(ended.nodes("started")) - {scene.node, reader, *TIMED}
        must(not again, f"{sorted(again)}: finished work was repeated")
        scene.nothing_left()

    return play


def saved_work(damage: Damage) -> Play:
    """Damage the newest shard or checkpoint of a killed attempt, whose content is then made again."""

    def play(scene: Scene) -> None:
        work = scene.home.partial_of(scene.artifact) / "work"
        running = scene.start()
        stage = scene.stage(running)
        until(lambda: bool(_saved(work)) or not stage.alive)
        scene.pause(scene.chance.random() * scene.undisturbed.nodes[scene.node].working_s / 2)
        if not stage.alive:
            raise TooLate
        os.kill(stage.pid, signal.SIGKILL)
        running.wait()
        path = max(_saved(work), key=lambda file: file.stat().st_mtime_ns)
        damage(path, scene.chance)
        scene.point = str(path.relative_to(work))
        ended = scene.refresh()
        scene.messages.append(ended.message)
        scene.finished(ended)

    return play


def _saved(work: Path) -> list[Path]:
    return [p for p in work.rglob("*") if p.is_file() and not p.name.startswith(".") and p.stat().st_size]


def database(find: Callable[[Home], Path], word: str, damage: Damage) -> Play:
    """Damage a database of views, and check for one error with a remedy, after which the refresh continues.

    Damage that the database does not notice must not disturb the refresh.
    """

    def play(scene: Scene) -> None:
        path = find(scene.home)
        for log in path.parent.glob(f"{path.name}-*"):  # entries that are not in the database file yet
            log.unlink()
        damage(path, scene.chance)
        ended = scene.refresh(PREFECT_API_URL="")  # with its own server, whose database is in the home
        scene.messages.append(ended.message)
        if ended.code != 0:
            scene.messages.pop()
            scene.check_end(ended, [2, 75], word)
            remedies = ("move", "restore it from a backup")
            must(any(each in scene.messages[-1] for each in remedies), "the message names no remedy")
            path.rename(path.with_suffix(".damaged"))
            ended = scene.refresh(PREFECT_API_URL="")
        scene.finished(ended)

    return play


def pages(path: Path, chance: random.Random) -> None:
    """Overwrite a third of the pages with noise, but not the first one."""
    content = bytearray(path.read_bytes())
    for page in range(1, len(content) // 4096):
        if chance.random() < 1 / 3:
            content[page * 4096 : (page + 1) * 4096] = chance.randbytes(4096)
    _rewrite(path, bytes(content))


def notes(damage: Damage) -> Play:
    """Damage the files outside the store: checksums, listings, requests of earlier attempts.

    They only explain and save time, so this must not disturb the refresh.
    """

    def play(scene: Scene) -> None:
        for folder in ("checksums", "listings", "logs"):
            files = [p for p in (scene.home.path / folder).rglob("*.json*") if p.stat().st_size]
            for path in files if folder == "checksums" else files[-1:]:
                damage(path, scene.chance)
        ended = scene.refresh()
        scene.messages.append(ended.message)
        scene.finished(ended)

    return play


def input_replaced(scene: Scene) -> Ended:
    """Replace an input file by one of other rows; the old one comes back for the next attempt."""
    path = scene.home.folder / READ_BY[scene.node]
    content = path.read_bytes()
    running = scene.start()
    try:
        scene.reach(running, (STARTING, WORKING))
        _replace(path, b"".join(content.splitlines(keepends=True)[:-1]))
        return scene.check_end(running.wait(), [2], "changed while it was read")
    finally:
        _replace(path, content)


def _replace(path: Path, content: bytes) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(content)
    other.replace(path)


def _mlflow(home: Home) -> Path:
    return home.path / "mlflow.db"


def _prefect(home: Home) -> Path:
    return home.path / "prefect" / "prefect.db"


HAS: dict[str, tuple[str, ...]] = {
    "manifest.json": _DAMAGED,
    ".parquet": ("prompts", "heldout", "rollout", "assisted", "mining", "earlier", "logs"),
    ".safetensors": ("sft", "opd", "control", "champion"),
    "drafter/config.json": ("sft", "opd", "control"),
    "target.json": ("target",),
    "evaluation.json": ("evaluation",),
    "drift.json": ("drift",),
    "verdict.json": ("gate",),
    "report.html": ("report",),
    "": _DAMAGED,
}
"""Nodes whose artifacts have files of this kind."""
ARTIFACTS: dict[str, tuple[Play, tuple[str, ...]]] = {
    f"{name}: {suffix or 'any file'}": (artifact_file(suffix, damage), nodes)
    for name, damage in (("flipped bit", flip), ("truncated", truncate))
    for suffix, nodes in HAS.items()
}
WORK: dict[str, Play] = {
    "flipped bit: unfinished work": saved_work(flip),
    "truncated: unfinished work": saved_work(truncate),
}
NOTES: dict[str, Play] = {
    "flipped bits: notes beside the store": notes(flip),
    "truncated: notes beside the store": notes(truncate),
}
DATABASES: dict[str, Play] = {
    "damaged pages: MLflow's database": database(_mlflow, "MLflow", pages),
    "truncated: MLflow's database": database(_mlflow, "MLflow", truncate),
    "damaged pages: Prefect's database": database(_prefect, "Prefect", pages),
    "truncated: Prefect's database": database(_prefect, "Prefect", truncate),
}
INPUTS: dict[str, Strike] = {"input file replaced": input_replaced}
