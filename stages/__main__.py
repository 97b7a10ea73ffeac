"""The stage process: `python -m draftsmith.stages REQUEST.json` runs one stage and reports as JSON lines on stdout.

A stage that needs several processes runs in each of them (`runtime/launch.py`). Rank 0 alone reports and writes.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path

from draftsmith.artifacts.redaction import redact_logs
from draftsmith.stages.runtime.memory import peak_memory_gb, relax_gc
from draftsmith.stages.runtime.process import (
    EventStream,
    ProcessContext,
    error_line,
    event_stream,
    expected_error,
    install_stop_handlers,
    keep_freed_memory,
    keep_kernels,
    load_stage,
    print_traceback,
    use_expandable_segments,
    use_threads,
)
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


def run_request(request: StageRequest, events: EventStream, stop: threading.Event) -> int:
    """Run the requested stage and return the exit code. An error becomes one `error` event."""
    try:
        use_expandable_segments()
        keep_kernels()
        if request.threads:
            use_threads(request.threads)
        stage, config = load_stage(request)
        parallel = stage.parallel(config) if stage.parallel is not None else None
        if parallel is not None and parallel.world > 1 and request.shard is None:
            use_threads(max(1, (request.threads or os.cpu_count() or 1) // parallel.processes))
            # only here: torch takes seconds to load, and reads the number of threads when it is loaded
            from draftsmith.stages.runtime.launch import run_ranks

            run_ranks(parallel, request, events.path, stop)
        else:
            context = ProcessContext(request, events, stop)
            if request.shard is None:
                stage.run(context, config)
            else:
                stage.shard(context, config, request.shard)
            context.summary(peak_memory_gb=peak_memory_gb())
    except BaseException as error:
        print_traceback(error)
        known = expected_error(error, request)
        code = 1 if known is None else known.exit_code
        message = error_line(error) if known is None else str(known)
        events.send("error", kind=type(known or error).__name__, message=message, exit_code=code)
        return code
    events.send("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
