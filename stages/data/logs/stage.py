"""Stage `logs`: answers that the target gave in production, as trajectories, in place of a rollout.

Replay rebuilds the trace of any drafter on any answer of the target, so logged answers serve SFT, mining and OPD
unchanged. They must be this target's own: every row is checked as far as its tokens go (`rows.py`), and a row that is
not used is counted and listed with its reason in `set_aside.jsonl`.
"""

from __future__ import annotations

from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.logs.config import LogsConfig
from draftsmith.stages.runtime.stage import SOURCES, Compute, Stage
from draftsmith.stages.target.info import read_target_info


def preflight(config: LogsConfig, target: Path) -> None:
    """Check that the files exist, and that rows of the allowed length fit into the target's context."""
    config.external_files()
    limit = read_target_info(target).max_positions
    if config.max_tokens is not None and config.max_tokens > limit:
        raise DraftsmithError(f"logs.max_tokens {config.max_tokens} exceeds the target's {limit} positions. Lower it.")


STAGE = Stage(
    name="logs",
    config=LogsConfig,
    inputs=("target", "prompts?", "earlier?", f"{SOURCES}?"),
    body="draftsmith.stages.data.logs.collect",
    preflight=preflight,
    compute=Compute.HEAVY,
)
