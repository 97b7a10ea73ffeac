"""The entry point of the `draftsmith` command: signals, exit codes, and errors as one line."""

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
from draftsmith.stages.runtime.memory import relax_gc

if TYPE_CHECKING:
    from draftsmith.flows.planning.graph import Pipeline

_EXIT_UNEXPECTED = 1
_EXIT_TERMINATED = 128 + signal.SIGTERM
_CONTINUE = "What was finished or saved is kept. Run the same command again to continue."


def main(arguments: Sequence[str] | None = None, pipeline: Pipeline | None = None) -> int:
    """Run the command and return its exit code.

    arguments: without the program's name; None: those of the process. pipeline: None: the refresh.
    """
    options = parser().parse_args(arguments)
    relax_gc()
    code = _run(options, pipeline)
    if (server := getattr(options, "lost_prefect", None)) is not None:
        server.leave(code)
    return code


def _run(options: argparse.Namespace, pipeline: Pipeline | None) -> int:
    signal.signal(signal.SIGTERM, _terminate)
    redact_logs()
    bypass_proxy_for_localhost()
    _show_warnings()
    try:
        with home_umask(home()):
            from draftsmith.flows.cli.commands import run_command  # heavy: after the help and wrong arguments

            run_command(options, pipeline)
    except KeyboardInterrupt:
        return _fail(f"interrupted. {_CONTINUE}", EXIT_INTERRUPTED)
    except SystemExit as ended:
        if ended.code != _EXIT_TERMINATED:
            raise
        return _fail(f"terminated. {_CONTINUE}", _EXIT_TERMINATED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `draftsmith status | head`
        return 0
    except RefusedError as error:  # a decision, not a fault
        return _fail(str(error), error.exit_code, error, prefix="")
    except DraftsmithError as error:
        return _fail(str(error), error.exit_code, error)
    except OSError as error:
        disk = from_os_error(error, "working with")
        return _fail(str(disk), disk.exit_code, error)
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {one_line(error)} (set DRAFTSMITH_DEBUG=1 for the traceback)"
        return _fail(message, _EXIT_UNEXPECTED, error)
    return 0


def _fail(message: str, code: int, error: BaseException | None = None, prefix: str = "error: ") -> int:
    if code in (EXIT_INTERRUPTED, _EXIT_TERMINATED):  # a second signal does not wait for Prefect's last events
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os._exit(code))
    if error is not None and os.environ.get("DRAFTSMITH_DEBUG") == "1":
        print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    print(f"draftsmith: {prefix}{printable(' '.join(redacted(message).split()))}", file=sys.stderr)
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
