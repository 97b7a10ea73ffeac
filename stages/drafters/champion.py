"""Stage `champion`: the drafter that serves, as the registry names it, taken into a refresh.

Its key is its content alone: the same champion is the same artifact, wherever its files lie. Where the target has
changed since, it is taken over for the new one, as what the refresh starts from and what it has to beat.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.stage import Config, NotInKey, Stage, StageContext

RECORD = "champion.json"


class ChampionConfig(Config):
    """A version of a drafter line."""

    line: Annotated[str, NotInKey()]
    version: Annotated[int, Field(ge=1), NotInKey()]
    folder: Annotated[str, Field(description="of the artifact, or of the uploaded drafter"), NotInKey()]
    content_id: Annotated[str, Field(description="of the artifact")]
    drafter_digest: Annotated[str, Field(description="of its checkpoint")]
    promoted_at: Annotated[str, NotInKey()] = ""
    figures: Annotated[dict[str, Any], NotInKey()] = Field(default={}, description="what it was worth at its promotion")


def run(ctx: StageContext, config: ChampionConfig) -> None:
    """Copy the checkpoint, verified by its digest, and write for which target it was promoted."""
    from draftsmith.stages.data.load import DRAFTER_FOLDER
    from draftsmith.stages.drafters.checkpoint import check_shape, descends_from, read_info, write_info
    from draftsmith.stages.drafters.digest import drafter_digest
    from draftsmith.stages.target.info import model_path, read_target_info

    source, folder = checkpoint_of(config), ctx.out / DRAFTER_FOLDER
    shutil.copytree(source, folder, dirs_exist_ok=True)
    if (found := drafter_digest(folder)) != config.drafter_digest:
        raise DraftsmithError(
            f"{config.line} version {config.version}: {source} has changed since it was registered (digest "
            f"{found[:12]}, registered {config.drafter_digest[:12]}): restore it, or promote another version"
        )
    check_shape(folder, model_path(ctx.inputs["target"]))
    info, target = read_info(folder), read_target_info(ctx.inputs["target"])
    changed = bool(info.target_digest) and info.target_digest != target.digest
    if changed:
        ctx.log(f"the target has changed since version {config.version} was promoted: it is taken over for the new one")
        taken = {"stage": "champion", "trained_for": info.target_digest}
        made_for = {"target_digest": target.digest, "target_source": target.source}
        adopted = dataclasses.replace(info, **made_for, parents=descends_from(source), training=taken)
        write_info(folder, adopted)
    record = {"target_changed": changed, "trained_for": info.target_digest, "target": target.digest}
    (ctx.out / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def checkpoint_of(config: ChampionConfig) -> Path:
    """Its checkpoint as it lies in the store or was uploaded. Raises DraftsmithError if it is not there."""
    from draftsmith.artifacts.home import home
    from draftsmith.artifacts.store.mirror import open_store

    source = open_store(home()).localize(Path(config.folder))
    if not source.is_dir():
        raise DraftsmithError(
            f"{config.line} version {config.version}: its folder {source} is not here: mount the store that it lies "
            "in, set registry.upload, or promote another version"
        )
    return source


STAGE = Stage(name="champion", config=ChampionConfig, inputs=("target",), body=__name__)
