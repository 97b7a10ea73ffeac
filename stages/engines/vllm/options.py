"""The options by which a vLLM server drafts with a checkpoint. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from draftsmith.stages.engines.servers.drafting import samples_proposals


def drafting_options(
    folder: Path, algorithm: str, block_size: int, schedule: Sequence[Sequence[int]] = ()
) -> list[str]:
    """Return the options by which a server drafts `block_size - 1` tokens a step and reports every step.

    folder: a checkpoint in the layout that vLLM loads. schedule: [fewest, most, proposals] of each range of requests in
    flight, at most `block_size - 1` proposals; empty: always as many.
    """
    config: dict[str, object] = {
        "model": os.fspath(folder.absolute()),
        "method": algorithm.lower(),  # vLLM would guess it from the folder's name
        "num_speculative_tokens": block_size - 1,
    }
    if samples_proposals(folder):
        config["draft_sample_method"] = "probabilistic"  # for sampled requests
    if schedule:
        config["num_speculative_tokens_per_batch_size"] = schedule
    return ["--speculative-config", json.dumps(config), "--per-request-spec-decode-metrics", "detailed"]
