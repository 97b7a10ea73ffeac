"""The `draftsmith` command: what is around each of them. Signals, exit codes, and an error as one line."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from draftsmith.artifacts.errors import EXIT_INTERRUPTED, DraftsmithError, RefusedError, from_os_error, one_line
from draftsmith.artifacts.home import home, home_umask
from draftsmith.artifacts.host import bypass_proxy_for_localhost
from draftsmith.artifacts.redaction import printable, redact_logs, redacted
from draftsmith.flows.cli.arguments import parser
from draftsmith.flows.cli.commands import COMMANDS
from draftsmith.stages.runtime.memory import relax_gc

if TYPE_CHECKING:
    from draftsmith.flows.planning.graph import Pipeline

_EXIT_UNEXPECTED = 1
_EXIT_TERMINATED = 128 + signal.SIGTERM
_CONTINUE = "what was finished or saved is kept: run the same command again to continue"


def main(arguments: Sequence[str] | None = None, pipeline: Pipeline | None = None) -> int:
    """Run the command and return its exit code. `pipeline` is the refresh unless given."""
    options = parser().parse_args(arguments)
    relax_gc()
    code = _code_of(options, pipeline)
    if (server := getattr(options, "lost_prefect", None)) is not None:
        server.leave(code)
    return code


def _code_of(options: argparse.Namespace, pipeline: Pipeline | None) -> int:
    signal.signal(signal.SIGTERM, _terminate)
    redact_logs()
    bypass_proxy_for_localhost()
    _show_warnings()
    try:
        with home_umask(home()):
            COMMANDS[options.does](options, pipeline or _refresh())
    except KeyboardInterrupt:
        return _fail(f"interrupted; {_CONTINUE}", EXIT_INTERRUPTED)
    except SystemExit as ended:
        if ended.code != _EXIT_TERMINATED:
            raise
        return _fail(f"terminated; {_CONTINUE}", _EXIT_TERMINATED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `draftsmith status | head`
        return 0
    except RefusedError as error:  # a decision, no fault
        return _fail(str(error), error.exit_code, error, what="")
    except DraftsmithError as error:
        return _fail(str(error), error.exit_code, error)
    except OSError as error:
        disk = from_os_error(error, "working with")
        return _fail(str(disk), disk.exit_code, error)
    except Exception as error:
        said = f"unexpected {type(error).__name__}: {one_line(error)}"
        return _fail(f"{said} (set DRAFTSMITH_DEBUG=1 for the traceback)", _EXIT_UNEXPECTED, error)
    return 0


def _refresh() -> Pipeline:
    from draftsmith.flows.refresh.graph import REFRESH

    return REFRESH


def _fail(message: str, code: int, error: BaseException | None = None, what: str = "error: ") -> int:
    if code in (EXIT_INTERRUPTED, _EXIT_TERMINATED):  # whoever asks again does not wait for what Prefect has to send
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, lambda *_: os._exit(code))
    if error is not None and os.environ.get("DRAFTSMITH_DEBUG") == "1":
        print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    print(f"draftsmith: {what}{printable(' '.join(redacted(message).split()))}", file=sys.stderr)
    return code


def _terminate(*_: object) -> None:
    raise SystemExit(_EXIT_TERMINATED)


def _show_warnings() -> None:
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("draftsmith: %(levelname)s: %(message)s"))
    logging.getLogger("draftsmith").handlers = [handler]


if __name__ == "__main__":
    sys.exit(main())
