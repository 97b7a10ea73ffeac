"""The command that started a run. The report, and a run that did not finish, derive other commands from it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

COMMAND = "DRAFTSMITH_COMMAND"  # environment variable: the command's config, overrides and MLflow, as JSON


@dataclass(frozen=True)
class Invocation:
    """The config file as the user typed it, the fields changed by `--set`, and the line that it names."""

    config: str
    overrides: Sequence[str] = ()
    line: str | None = None
    version: str = "challenger"  # the challenger's number, or its alias, which it has until one is promoted
    mlflow: str = ""  # the command, or the address, that shows the runs

    def run(self, *more: str) -> str:
        """Return the command that runs the refresh again."""
        return self.command("run", *more)

    def command(self, verb: str, *more: str, drafters: Sequence[str] = ()) -> str:
        """Return a command with this config."""
        sets = [word for override in self.overrides for word in ("--set", override)]
        return shlex.join(["draftsmith", verb, *drafters, self.config, *sets, *more])


def invocation(command: str | None, line: str | None) -> Invocation:
    """Parse the value of `COMMAND`; a run that no command started has a placeholder for the config file."""
    fields = json.loads(command) if command else {"config": "CONFIG"}
    return Invocation(**fields, line=line)
