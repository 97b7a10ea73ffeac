"""A stage whose rank 1 hangs: rank 0 waits until the timeout of the process group."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

from torch import distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.training.sft import stage as sft


def run(_ctx: StageContext, _config: Any) -> None:
    ranks = Ranks.current()
    ranks.barrier()
    _set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
    if ranks.rank == 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else the launcher kills it half a minute later
        time.sleep(600)
    ranks.barrier()


STAGE = replace(sft.STAGE, body=__name__)
