"""Stage `adoption`: takes a drafter that was trained for an earlier revision of the target over for this one.

Everywhere else a drafter of another target is refused, because its acceptance decays silently. Here that is the point:
the old drafter is what a refresh after a change of the target starts from, and what it has to beat.
"""

from __future__ import annotations

from draftsmith.stages.contract import Config, Stage, StageContext


class AdoptionConfig(Config):
    """Nothing to choose."""


def run(ctx: StageContext, _config: AdoptionConfig) -> None:
    """Copy the checkpoint and write this target into its record. The shapes must fit."""
    import dataclasses
    import shutil

    from draftsmith.stages.drafters.checkpoint import check_shape, descends_from, read_info, write_info
    from draftsmith.stages.stored import DRAFTER_FOLDER
    from draftsmith.stages.targets.info import model_path, read_target_info

    source, folder = ctx.inputs["drafter"] / DRAFTER_FOLDER, ctx.out / DRAFTER_FOLDER
    target = read_target_info(ctx.inputs["target"])
    check_shape(source, model_path(ctx.inputs["target"]))
    shutil.copytree(source, folder, dirs_exist_ok=True)
    info = read_info(source)
    write_info(
        folder,
        dataclasses.replace(
            info,
            target_digest=target.digest,
            target_source=target.source,
            parents=descends_from(source),
            training={"stage": "adoption", "trained_for": info.target_digest},
        ),
    )


STAGE = Stage(name="adoption", config=AdoptionConfig, inputs=("target", "drafter"), run=run)
