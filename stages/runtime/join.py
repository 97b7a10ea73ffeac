"""A rank on a node other than the flow's: `torchrun … -m draftsmith.stages.runtime.join` (configs/scale/README.md).

The node that runs the flow is the rendezvous while it trains. Its rank 0 sends the request.
"""

from __future__ import annotations

import os

from draftsmith.stages.runtime.process import use_expandable_segments, use_threads


def main() -> None:
    use_expandable_segments()
    use_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    from draftsmith.stages.runtime.launch import run_rank  # torch reads the number of threads when it is loaded

    run_rank(None, None, os.devnull)  # a training that was asked to stop is not a failure of this node


if __name__ == "__main__":
    main()
