"""Declaration of stage `diagnosis`: checks whether a running server drafts like replay and, if not, why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.config import SamplingConfig
from draftsmith.stages.replay.options import PARITY_MISMATCH, MaxParityMismatch
from draftsmith.stages.runtime.stage import Compute, Config, NotInKey, Stage
from draftsmith.stages.targets.info import model_path, read_target_info


class DiagnosisConfig(Config):
    """One server, and the drafter that it should serve."""

    url: str
    api_key_env: Annotated[str | None, NotInKey()] = None
    """Like `engine.api_key_env`: the environment variable with the server's API key."""
    drafter: Annotated[str, Field(description="folder of the checkpoint")]
    prompts: Annotated[int, Field(ge=1, description="validation and held-out prompts that the server answers")] = 16
    sampling: SamplingConfig = SamplingConfig()
    max_parity_mismatch: MaxParityMismatch = PARITY_MISMATCH

    def external_files(self) -> list[Path]:
        """Return the files of the checkpoint."""
        folder = Path(self.drafter)
        if not folder.is_dir():
            raise DraftsmithError(f"{folder}: no such folder. Name the checkpoint that the server should draft with.")
        return sorted(path for path in folder.iterdir() if path.is_file())


def preflight(config: DiagnosisConfig, target: Path) -> None:
    """Check that the drafter is complete and made for this target."""
    from draftsmith.stages.drafters.checkpoint import check_complete, check_drafter, check_shape  # imports torch

    folder = Path(config.drafter)
    check_drafter(folder, read_target_info(target))
    check_shape(folder, model_path(target))
    check_complete(folder)


STAGE = Stage(
    name="diagnosis",
    config=DiagnosisConfig,
    inputs=("target", "prompts"),
    body="draftsmith.stages.evaluation.diagnosis.body",
    compute=Compute.HEAVY,
    preflight=preflight,
)
