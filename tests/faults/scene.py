"""One fault: a home without one node, the command, the fault at a seeded moment, and what must hold afterwards."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from tests.faults.configs import LINE
from tests.faults.home import Ended, Home, Running
from tests.faults.undisturbed import MEASURES, TIMED, Undisturbed, arguments
from tests.faults.watch import StageProcess, next_stage, until

STARTING, WORKING, COMMITTING = "starting", "working", "committing"
_GONE_WITHIN_S = 8.0  # for children to end after their parent
_LIMIT_S = 5.0  # more than a stage may take
_COMMIT_S = 0.03  # about what manifest and renames take


class Broken(AssertionError):
    """Raised when something does not hold that must hold. The message names it."""


class TooLate(Exception):
    """Raised when the stage ended before the moment of the fault: the scene must be played again, earlier."""


def must(holds: object, what: str) -> None:
    if not holds:
        raise Broken(what)


@dataclass
class Scene:
    """The setting of one fault, which strikes the stage of `node`."""

    undisturbed: Undisturbed
    node: str
    chance: random.Random
    earlier: float = 1.0  # factor on the moment of the fault
    afresh: bool = True  # False: the home stays as the previous scene left it
    point: str = ""  # where it was injected, as text
    messages: list[str] = field(default_factory=list)  # of the command, about the fault
    complaints: list[str] = field(default_factory=list)  # defects that lose nothing

    def __post_init__(self) -> None:
        self.home: Home = self.undisturbed.without(self.node) if self.afresh else self.undisturbed.home
        self.arguments: list[str] = arguments(self.undisturbed.kind, self.undisturbed.folder)

    @property
    def artifact(self) -> str:
        return self.undisturbed.nodes[self.node].artifact

    def start(self, *arguments: str, **variables: str) -> Running:
        return self.home.start(*self.arguments, *arguments, **variables)

    def refresh(self, *arguments: str, **variables: str) -> Ended:
        return self.start(*arguments, **variables).wait()

    def limit(self) -> tuple[str, str]:
        """Return arguments that set a time limit which the undisturbed stage keeps."""
        times = self.undisturbed.nodes[self.node]
        seconds = _LIMIT_S + 2 * (times.starting_s + times.working_s)
        return "--set", f"stages.time_limits.{self.node}={seconds / 60:.3f}"

    # ---- the moment of the fault

    def reach(self, running: Running, phases: Sequence[str] = (STARTING, WORKING, WORKING)) -> StageProcess:
        """Wait for a random moment in the life of the node's stage. Raise TooLate if it has already ended."""
        times, phase, share = self.undisturbed.nodes[self.node], self.chance.choice(phases), self.chance.random()
        stage = self.stage(running)
        if phase == STARTING:
            self.pause(share * times.starting_s)
        elif phase == WORKING:
            stage.wait_until_working()
            self.pause(share * times.working_s)
        else:
            stage.wait_until_ended()
            self.pause(share * _COMMIT_S)
        self.point = f"{phase} +{share * self.earlier:.2f}"
        ended = running.process.poll() is not None if phase == COMMITTING else not stage.alive
        if ended:
            raise TooLate
        return stage

    def stage(self, running: Running) -> StageProcess:
        """Wait for the node's stage process, and return it."""
        stage = next_stage(self.home, running)
        if stage is None:
            raise Broken(f"the stage did not start: {running.wait().message}")
        must(stage.artifact == self.artifact, f"{stage.artifact} is made where {self.artifact} was expected")
        return stage

    def pause(self, seconds: float) -> None:
        stop = seconds * self.earlier
        if stop > 0:
            time.sleep(stop)

    # ---- what must hold

    def check_end(self, ended: Ended, codes: Sequence[int], *words: str) -> Ended:
        """Check that it ended with one of these codes, and that its message has one of the words if any are given."""
        if ended.code not in codes and ended.code == self.undisturbed.code and self.node in ended.nodes("done"):
            raise TooLate
        self.messages.append(ended.message)
        must(ended.code in codes, f"ended with {ended.code}, not {codes}: {ended.message or ended.err[-400:]}")
        if "Traceback" in ended.out + ended.err:
            self.complaints.append("a traceback was printed")
        if words and not any(word in ended.message for word in words):
            self.complaints.append(f"the message does not mention {words[0]!r}: {ended.message!r}")
        return ended

    def nothing_left(self) -> None:
        """Check that no process of the home is left and no lock is taken."""
        try:
            until(lambda: not self.home.processes(), _GONE_WITHIN_S)
        except TimeoutError:
            raise Broken(f"{len(self.home.processes())} processes are left") from None
        try:  # a process that ends frees its memory first and closes its files afterwards
            until(lambda: not self.home.locked_files(), _GONE_WITHIN_S)
        except TimeoutError:
            raise Broken(f"{self.home.locked_files()[:1]} is locked") from None

    def saved(self) -> int:
        """Return how many steps or answers of the unfinished attempt the next one must at least continue from."""
        partial = self.home.partial_of(self.artifact)
        metrics, answers = partial / "out" / "metrics.jsonl", sorted(partial.glob("work/trajectories/[!.]*.parquet"))
        if metrics.exists():
            interval = int(self.home.config_of(self.artifact)["checkpoint_every"])
            return max(0, metrics.read_bytes().count(b"\n") - interval + 1)
        rows = sum(pq.read_metadata(path).num_rows for path in answers)
        all_rows = pq.read_metadata(self._finished / "trajectories.parquet").num_rows if rows else 0
        return rows if rows < all_rows else 0  # if the rollout was about to end, the next attempt reports nothing

    @property
    def _finished(self) -> Path:
        """Return the folder of the artifact of the undisturbed refresh."""
        return Home(self.undisturbed.kept, self.undisturbed.kept).folder_of(self.artifact)

    def continues(self, *arguments: str, **variables: str) -> Ended:
        """Run the same command, and check that it ends the refresh with the undisturbed content and repeats no work."""
        saved = self.saved()
        ended = self.refresh(*arguments, **variables)
        self.finished(ended)
        self.kept(ended, saved)
        return ended

    def kept(self, ended: Ended, saved: int) -> None:
        """If the command reached the node, check that it continued from everything saved."""
        if self.node in ended.nodes("done") or ended.kept is not None:
            kept = ended.kept or 0
            must(kept >= saved, f"{saved} steps or answers were saved, but the same command continued from {kept}")

    def finished(self, ended: Ended) -> None:
        wanted = self.undisturbed.code
        must(
            ended.code == wanted, f"the same command then ended with {ended.code}: {ended.message or ended.err[-400:]}"
        )
        self.same_content()
        again = set(ended.nodes("started")) - {self.node, *self._made_again}
        must(not again, f"{', '.join(sorted(again))}: finished work was repeated")
        self.nothing_left()
        litter = self.home.litter()
        must(not litter, f"{litter[:1]} is left in the store")
        must(not (running := self.home.runs_running()), f"MLflow shows {running} as running")
        versions = self.home.versions()
        must(versions == self.undisturbed.versions, f"the line has the versions {versions}")

    @property
    def _made_again(self) -> Collection[str]:
        """Return the nodes that may be made again: they show durations, or the latest check of the line."""
        if self.node in (MEASURES, *TIMED):
            return TIMED
        return ("report",) if self.undisturbed.kind == LINE else ()

    def same_content(self) -> None:
        actual, wanted = _untimed(self.home.content_ids()), _untimed(self.undisturbed.content_ids)
        for artifact, content in wanted.items():
            must(artifact in actual, f"{artifact} is missing")
            must(actual[artifact] == content, f"{artifact} has another content")
        others = sorted(actual.keys() - wanted.keys())
        must(not others, f"{others[:1]} should not be there: something before it has another content")


def _untimed(artifacts: Mapping[str, str]) -> dict[str, str]:
    return {artifact: content for artifact, content in artifacts.items() if artifact.split("/")[0] not in TIMED}


Play = Callable[[Scene], None]
Strike = Callable[[Scene], Ended]
"""Starts the command, injects the fault, and returns the end: finished, or so that the same command continues."""
