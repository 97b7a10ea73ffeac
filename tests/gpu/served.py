"""Prints the speeds that evaluations on SGLang have left in the store, as one table: `python -m tests.gpu.served`.

A row is a drafter, or none, at a number of requests in flight; `traced` if all requests left their verify steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.stages.engines.sglang.protocol import ENVIRONMENT
from draftsmith.stages.evaluation.config import EvaluationConfig
from tests.benchmarks import harness


def rows(store: Store) -> Iterator[dict[str, Any]]:
    """Yield the rows of all evaluations on SGLang, oldest first."""
    for manifest in store.list():
        if manifest.stage != "evaluation":
            continue
        engine = EvaluationConfig.model_validate(manifest.config).engine
        if engine.kind != "sglang" or engine.launch is None:
            continue
        result = EvaluationResult.read(store.path(manifest.stage, manifest.key))
        for table in result.speed_by_setting:
            for arm, speed in table.arms.items():
                yield {
                    "in flight": table.concurrency,
                    "drafter": arm,
                    "block": speed.block_size or "-",
                    "traced": "yes" if engine.launch.environment.get(ENVIRONMENT) == "1" else "no",
                    "tokens/s": round(speed.tokens_per_s),
                    "speed-up": speed.speedup or "-",
                    "from": speed.speedup_low or "-",
                    "to": speed.speedup_high or "-",
                    "tau": speed.tau_served or "-",
                    "GPU": result.machine.gpus[0] if result.machine.gpus else "none",
                }


def main() -> None:
    found = list(rows(open_store(home())))
    if not found:
        raise DraftsmithError(f"{home()}: no evaluation on SGLang. Run `draftsmith evaluate` first.")
    harness.print_rows("SGLang", found)


if __name__ == "__main__":
    harness.run(main)
