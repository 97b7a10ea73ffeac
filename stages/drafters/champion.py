"""Stage `champion`: copies the drafter that serves, according to the registry, into a refresh.

Its cache key is only its content: the same champion is the same artifact, wherever its files are. If the target has
changed since, the drafter is adopted for the new target: the refresh starts from it and has to beat it.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.results.drafting import AdoptedChampion
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.runtime.stage import Config, NotInKey, Stage, StageContext
from draftsmith.stages.targets.info import model_path, read_target_info


class ChampionConfig(Config):
    """A version of a model line."""

    line: Annotated[str, NotInKey()]
    version: Annotated[int, Field(ge=1), NotInKey()]
    folder: Annotated[str, Field(description="folder of the artifact or of the uploaded drafter"), NotInKey()]
    content_id: Annotated[str, Field(description="content id of the artifact")]
    drafter_digest: Annotated[str, Field(description="digest of its checkpoint")]
    kind: Annotated[str, NotInKey(), Field(description="of the drafter; empty for a version without this tag")] = ""
    promoted_at: Annotated[str, NotInKey()] = ""
    figures: Annotated[dict[str, Any], NotInKey()] = Field(default={}, description="its metrics at its promotion")

    def checkpoint(self) -> Path:
        """Return the folder of the checkpoint, in the store or as uploaded. Raises DraftsmithError if it is missing."""
        source = open_store(home()).localize(Path(self.folder))
        if not source.is_dir():
            raise DraftsmithError(
                f"{self.line} version {self.version}: its folder {source} is missing. Mount the store that holds it, "
                "or promote a version that is uploaded whole (registry.upload)."
            )
        return source


def run(ctx: StageContext, config: ChampionConfig) -> None:
    """Copy the checkpoint, verify its digest, and record the target that it was promoted for."""
    from draftsmith.stages.drafters import checkpoint  # loads torch, and planning reads this module

    source, folder = config.checkpoint(), ctx.out / DRAFTER_FOLDER
    shutil.copytree(source, folder, dirs_exist_ok=True)
    if (digest := drafter_digest(folder)) != config.drafter_digest:
        raise DraftsmithError(
            f"{config.line} version {config.version}: {source} has changed since it was registered (digest "
            f"{digest[:12]}, registered {config.drafter_digest[:12]}). Restore it, or promote another version."
        )
    checkpoint.check_shape(folder, model_path(ctx.inputs["target"]))
    info, target = checkpoint.read_info(folder), read_target_info(ctx.inputs["target"])
    changed = bool(info.target_digest) and info.target_digest != target.digest
    if changed:
        ctx.log(
            f"the target has changed since version {config.version} was promoted. Adopting the champion for the new "
            "one."
        )
        adopted = dataclasses.replace(
            info.made_for(target),
            parents=checkpoint.lineage_from(source),
            training={"stage": "champion", "trained_for": info.target_digest},
        )
        checkpoint.write_info(folder, adopted)
    AdoptedChampion(target=target.digest, target_changed=changed, trained_for=info.target_digest).write(ctx.out)


STAGE = Stage(name="champion", config=ChampionConfig, inputs=("target",), body="draftsmith.stages.drafters.champion")
