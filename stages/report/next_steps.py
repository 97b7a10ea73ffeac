"""What to do after a refresh, as commands: the same on the final screen and in the report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from draftsmith.artifacts.results.evaluation import CHAMPION
from draftsmith.stages.report.review import Review, duration

COMMAND = "DRAFTSMITH_COMMAND"  # of the environment: the config and overrides of the command, as JSON, for the report
_UNSAFE = ("checksums", "lossless")  # groups of rules: a drafter that breaks one is not promoted by hand either


@dataclass(frozen=True)
class Step:
    """A command, its purpose, and how long it takes where that is known."""

    purpose: str
    command: str
    seconds: float | None = None

    @property
    def label(self) -> str:
        """Return the purpose, with the time."""
        return self.purpose if self.seconds is None else f"{self.purpose}, about {duration(max(1, self.seconds))}"


@dataclass(frozen=True)
class Invocation:
    """The config file as the user typed it, the fields changed by `--set`, and the line that it names."""

    config: str
    overrides: Sequence[str] = ()
    line: str | None = None
    version: str = "challenger"  # of the challenger: a number, or the alias that it has until one is promoted

    def run(self, *more: str) -> str:
        """Return the command that runs the refresh again."""
        return self.command("run", *more)

    def command(self, verb: str, *more: str, drafters: Sequence[str] = ()) -> str:
        """Return a command with this config."""
        sets = [word for each in self.overrides for word in ("--set", each)]
        return shlex.join(["draftsmith", verb, *drafters, self.config, *sets, *more])


def invocation(command: str | None, line: str | None) -> Invocation:
    """Return what `COMMAND` holds; a run that comes from no command has no file."""
    found = json.loads(command) if command else {"config": "CONFIG"}
    return Invocation(**found, line=line)


def next_steps(review: Review, command: Invocation, seconds: Mapping[str, float]) -> list[Step]:
    """Return what to do after this outcome. command: of this refresh. seconds: duration of its nodes."""
    look = Step("see why", shlex.join(["draftsmith", "report", command.config, "--open"]))
    if command.line is None:
        return [look]
    challenger, champion = f"{command.line}@{command.version}", f"{command.line}@champion"
    by_hand = Step("promote it by hand", shlex.join(["draftsmith", "promote", challenger, "--why", "…"]))
    kind = review.outcome.kind
    if kind == "promoted":
        folder = f"{command.line}-champion"
        return [
            Step("serve it (or set on_promote, which notifies your servers)",
                 shlex.join(["draftsmith", "export", champion, folder])),
            Step("next refresh: measures drift first, trains if there is any", command.run()),
        ]  # fmt: skip
    if kind == "inconclusive":
        first = Step("measure again", command.run(), seconds.get("evaluation")) if review.measured_again else look
        tau_only = Step(
            "judge by acceptance length", command.run("--set", "gate.judge_speed=false"), seconds.get("gate")
        )
        unclear = {check.group for check in review.checks if check.result == "inconclusive"}
        return [first, *([tau_only] if unclear and unclear <= {"speed", "speed-up"} else []), by_hand]
    unsafe = any(check.result == "failed" and check.group in _UNSAFE for check in review.checks)
    drafters = [challenger, *([champion] if review.other == CHAMPION else [])]
    compare = Step("measure the drafters again", command.command("evaluate", drafters=drafters))
    return [look, compare, *([] if unsafe else [by_hand])]


def refresh_anyway(command: Invocation) -> Step:
    """Return what to do if the champion is current."""
    return Step("refresh anyway", command.run("--force", "drift"))
