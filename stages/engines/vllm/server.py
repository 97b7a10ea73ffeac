"""The command line of a vLLM server, and the drafter's checkpoint in the layout that it loads.

Plans and commands on the registry read this module, so it imports no torch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.config import VLLMEngineConfig
from draftsmith.stages.engines.servers.process import option_arguments
from draftsmith.stages.engines.servers.requirements import ServerRequirements, samples_proposals


def server_command(config: VLLMEngineConfig, required: ServerRequirements, exported: Path) -> list[str]:
    """Return the server's command line without its port. exported: gets the drafter in vLLM's layout."""
    assert config.launch is not None
    python, launch = config.interpreter, config.launch
    if not python.is_file():
        raise DraftsmithError(f"engine.python: {python} does not exist. Set an interpreter that has vLLM.")
    parts = [os.fspath(python), "-m", "vllm.entrypoints.cli.main", "serve", os.fspath(required.model_folder.absolute())]
    parts += ["--host", "127.0.0.1", "--dtype", required.target.dtype, "--generation-config", "vllm"]
    if launch.tensor_parallel > 1:
        parts += ["--tensor-parallel-size", str(launch.tensor_parallel)]
    parts += ["--max-num-seqs", str(config.concurrency)]
    if launch.memory_fraction is not None:
        parts += ["--gpu-memory-utilization", str(launch.memory_fraction)]
    if required.drafter_folder is not None:
        assert required.algorithm is not None and required.block_size is not None
        drafter = _in_its_layout(required.drafter_folder, required, exported)
        parts += drafting_options(drafter, required.algorithm, required.block_size)
    return parts + option_arguments(launch.options)


def drafting_options(
    folder: Path, algorithm: str, block_size: int, schedule: Sequence[Sequence[int]] = ()
) -> list[str]:
    """Return the options for a server to draft `block_size - 1` tokens per step and report every step.

    folder: a checkpoint in the layout that vLLM loads. schedule: [fewest, most, proposals] for each range of requests
    in flight, at most `block_size - 1` proposals; empty: always that many.
    """
    config: dict[str, object] = {
        "model": os.fspath(folder.absolute()),
        "method": "mtp" if algorithm == "NEXTN" else algorithm.lower(),  # vLLM would guess it from the folder's name
        "num_speculative_tokens": block_size - 1,
    }
    if samples_proposals(folder):
        config["draft_sample_method"] = "probabilistic"  # for sampled requests
    if schedule:
        config["num_speculative_tokens_per_batch_size"] = schedule
    return ["--speculative-config", json.dumps(config), "--per-request-spec-decode-metrics", "detailed"]


def _in_its_layout(drafter: Path, required: ServerRequirements, exported: Path) -> Path:
    """Return the folder of the drafter in the layout that vLLM loads; it is written to `exported` if necessary."""
    # these import torch
    from draftsmith.stages.drafters.checkpoint_format import is_speculators
    from draftsmith.stages.drafters.export import export_eagle3, export_speculators

    if is_speculators(drafter) or required.algorithm == "NEXTN":
        return drafter
    shutil.rmtree(exported, ignore_errors=True)
    if required.algorithm == "EAGLE3":
        export_eagle3(drafter, exported)
    else:
        export_speculators(drafter, required.model_folder, os.fspath(required.model_folder.absolute()), exported)
    return exported
