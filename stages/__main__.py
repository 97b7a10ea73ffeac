"""The stage process: `python -m draftsmith.stages REQUEST.json` runs one stage and reports as JSON lines on stdout.

A stage that asks for several processes runs in each of them (`runtime/ranks.py`). Rank 0 alone reports and writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from draftsmith.artifacts.redaction import redact_logs
from draftsmith.stages.runtime.memory import relax_gc
from draftsmith.stages.runtime.process import event_stream, install_stop_handlers, keep_freed_memory, run_request


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m draftsmith.stages", description="Run one stage in this process.")
    parser.add_argument("request", type=Path, help="JSON file: stage, module, config, inputs, out, work, seed, threads")
    options = parser.parse_args(arguments)

    redact_logs()
    relax_gc()
    keep_freed_memory()
    stop = install_stop_handlers()
    return run_request(json.loads(options.request.read_text("utf-8")), event_stream(), stop)


if __name__ == "__main__":
    sys.exit(main())
