"""The body of stage `champion`: copies the checkpoint, and adopts it for a target that has changed."""

from __future__ import annotations

import dataclasses
import json
import shutil

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.checkpoint import check_shape, lineage_from, read_info, write_info
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.stage import RECORD, ChampionConfig
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.target.info import model_path, read_target_info


def run(ctx: StageContext, config: ChampionConfig) -> None:
    """Copy the checkpoint, verify its digest, and record the target that it was promoted for."""
    source, folder = config.checkpoint(), ctx.out / DRAFTER_FOLDER
    shutil.copytree(source, folder, dirs_exist_ok=True)
    if (digest := drafter_digest(folder)) != config.drafter_digest:
        raise DraftsmithError(
            f"{config.line} version {config.version}: {source} has changed since it was registered (digest "
            f"{digest[:12]}, registered {config.drafter_digest[:12]}). Restore it, or promote another version."
        )
    check_shape(folder, model_path(ctx.inputs["target"]))
    info, target = read_info(folder), read_target_info(ctx.inputs["target"])
    changed = bool(info.target_digest) and info.target_digest != target.digest
    if changed:
        ctx.log(f"the target has changed since version {config.version} was promoted: it is adopted for the new one")
        adopted = dataclasses.replace(
            info,
            target_digest=target.digest,
            target_source=target.source,
            parents=lineage_from(source),
            training={"stage": "champion", "trained_for": info.target_digest},
        )
        write_info(folder, adopted)
    record = {"target_changed": changed, "trained_for": info.target_digest, "target": target.digest}
    (ctx.out / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
