"""A rank on another node than the flow's: `torchrun … -m draftsmith.stages.runtime.join` (configs/scale/README.md).

The node that runs the flow is the rendezvous as long as it trains. Its first rank sends what is trained.
"""

from __future__ import annotations

import os

from draftsmith.stages.runtime.process import run_rank, use_threads


def main() -> None:
    use_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    run_rank(None, os.devnull)  # a training that was asked to stop is no failure of this node


if __name__ == "__main__":
    main()
