"""The stage process: `python -m draftsmith.stages REQUEST.json` runs one stage and reports as JSON lines on stdout.

A stage that needs several processes runs in each of them (`runtime/rank_process.py`). Rank 0 alone reports and writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from draftsmith.artifacts.redaction import redact_logs
from draftsmith.stages.runtime.memory import relax_gc
from draftsmith.stages.runtime.process import event_stream, install_stop_handlers, keep_freed_memory, run_request
from draftsmith.stages.runtime.stage import StageRequest


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m draftsmith.stages", description="Run one stage in this process.")
    parser.add_argument("request", type=Path, help="JSON file of a StageRequest (runtime/stage.py)")
    options = parser.parse_args(arguments)

    redact_logs()
    relax_gc()
    keep_freed_memory()
    stop = install_stop_handlers()
    request = StageRequest.model_validate_json(options.request.read_text("utf-8"))
    return run_request(request, event_stream(), stop)


if __name__ == "__main__":
    sys.exit(main())
