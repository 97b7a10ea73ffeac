"""The command that began a run, from which the report and a run that did not finish make other commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

COMMAND = "DRAFTSMITH_COMMAND"  # of the environment: the config, overrides and MLflow of the command, as JSON


@dataclass(frozen=True)
class Invocation:
    """The config file as the user typed it, the fields changed by `--set`, and the line that it names."""

    config: str
    overrides: Sequence[str] = ()
    line: str | None = None
    version: str = "challenger"  # of the challenger: a number, or the alias that it has until one is promoted
    mlflow: str = ""  # the command, or the address, to look at the runs

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
