"""The command line of a vLLM server, and the drafter's checkpoint in the layout that it loads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import skeleton_of
from draftsmith.stages.drafters.checkpoint_format import is_speculators
from draftsmith.stages.drafters.export import export_speculators
from draftsmith.stages.engines.config import VLLMEngineConfig
from draftsmith.stages.engines.servers.process import option_arguments
from draftsmith.stages.engines.servers.requirements import ServerRequirements


def server_command(config: VLLMEngineConfig, required: ServerRequirements, exported: Path) -> list[str]:
    """Return the server's command line without its port. exported: gets the drafter in vLLM's layout."""
    assert config.launch is not None
    python, launch = config.interpreter, config.launch
    if not python.is_file():
        raise DraftsmithError(f"engine.python: {python} does not exist. Give an interpreter that has vLLM.")
    parts = [os.fspath(python), "-m", "vllm.entrypoints.cli.main", "serve", os.fspath(required.model_folder.absolute())]
    parts += ["--host", "127.0.0.1", "--dtype", required.target.dtype, "--generation-config", "vllm"]
    if launch.tensor_parallel > 1:
        parts += ["--tensor-parallel-size", str(launch.tensor_parallel)]
    if launch.data_parallel > 1:
        parts += ["--data-parallel-size", str(launch.data_parallel)]
    parts += ["--max-num-seqs", str(config.concurrency)]  # of each replica
    if launch.memory_fraction is not None:
        parts += ["--gpu-memory-utilization", str(launch.memory_fraction)]
    if required.drafter_folder is not None:
        parts += ["--speculative-config", json.dumps(speculative_config(required, exported))]
        parts += ["--per-request-spec-decode-metrics", "detailed"]
    return parts + option_arguments(launch.options)


def speculative_config(required: ServerRequirements, exported: Path) -> dict[str, object]:
    """Return the value of `--speculative-config`, and write the drafter to `exported` in the layout that vLLM loads."""
    source = required.drafter_folder
    assert source is not None and required.algorithm is not None and required.block_size is not None
    if required.algorithm != "EAGLE3" and not is_speculators(source):
        shutil.rmtree(exported, ignore_errors=True)
        export_speculators(source, required.model_folder, os.fspath(required.model_folder.absolute()), exported)
        source = exported
    config: dict[str, object] = {
        "model": os.fspath(source.absolute()),
        "method": required.algorithm.lower(),  # vLLM would guess it from the folder's name
        "num_speculative_tokens": required.block_size - 1,
    }
    if skeleton_of(source).samples_proposals:
        config["draft_sample_method"] = "probabilistic"  # for sampled requests
    return config
