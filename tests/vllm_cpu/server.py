"""A vLLM server on the CPU, in its own environment, with the command that the engine gives it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.config import VLLMEngineConfig
from draftsmith.stages.engines.server_state import API_KEYS
from draftsmith.stages.engines.servers.process import ServerProcess, free_ports
from draftsmith.stages.engines.servers.requirements import server_requirements
from draftsmith.stages.engines.vllm.plugin import BACKEND
from draftsmith.stages.engines.vllm.server import server_command
from tests.sglang_cpu.server import START_LIMIT_S, started

_ROOT = Path(__file__).parents[2]
KEY_VARIABLE, KEY = API_KEYS["vllm"], "key-of-the-tests"
LONGEST = 256
ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).parent / "interpreted"),
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
OPTIONS = {"enforce-eager": True, "max-model-len": LONGEST}


def vllm_python() -> Path | str:
    """Return the interpreter that has vLLM, or the reason why the tests that need it are skipped."""
    python = _ROOT / ".venv-vllm-cpu" / "bin" / "python"
    return python if python.is_file() else "no vLLM here: `make vllm-cpu` builds its environment"


PYTHON = vllm_python()
MARKS = [  # of a module of tests with its servers
    pytest.mark.vllm,
    pytest.mark.integration,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(isinstance(PYTHON, str), reason=str(PYTHON)),
]


def launched(python: Path, **fields: Any) -> dict[str, Any]:
    """Return the section of an engine that launches servers on the CPU."""
    launch = {"options": OPTIONS, "environment": ENVIRONMENT, "start_timeout_s": START_LIMIT_S}
    return {"kind": "vllm", "python": str(python), "launch": launch, "concurrency": 4, **fields}


@contextmanager
def running_server(
    python: Path,
    target: Path,
    drafter: Path,
    folder: Path,
    edit: Callable[[Path], None] = lambda _: None,
    mlflow: str = "",
) -> Iterator[str]:
    """Run a server whose drafter can be swapped and yield its address; its log goes to `folder`.

    It requires the API key that the environment has meanwhile. target: its artifact. drafter: a checkpoint. edit:
    changes the folder of the exported one before it is loaded. mlflow: URL of the MLflow server that it fetches uploads
    from.
    """
    config = VLLMEngineConfig.model_validate(launched(python))
    required = server_requirements(config, target, drafter, DraftingConfig(), LONGEST)
    command = server_command(config, required, folder / "drafter")
    edit(folder / "drafter")
    (port,) = free_ports(1)
    command += ["--weight-transfer-config", json.dumps({"backend": BACKEND})]
    environment = {**ENVIRONMENT, "VLLM_SERVER_DEV_MODE": "1", "MLFLOW_TRACKING_URI": mlflow}
    process = ServerProcess(command, environment, folder / "vllm.log", port)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, KEY)
        with started(process) as url:
            yield url
