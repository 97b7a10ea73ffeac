"""Stage `procedural_target`: a small target for experiments, trained on procedural text; or a new revision of any one.

Its artifact is that of stage `target`, so that every other stage takes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.contract import Compute, Stage, StageContext
from draftsmith.stages.procedural.training import Kept, ShapeConfig, TrainingTextConfig, train_target
from draftsmith.stages.targets.config import Dtype, TargetConfig

_MODEL = "model"
_METRICS_EVERY = 10


class ProceduralTargetConfig(TrainingTextConfig):
    """What it is taught. With a target as input the training goes on from there, with that target's shape and dtype."""

    kind: Literal["procedural"] = "procedural"
    shape: ShapeConfig = ShapeConfig()


def preflight(_config: ProceduralTargetConfig, target: Path) -> None:
    """What it is taught is written in the chat template of the target that it goes on from."""
    from draftsmith.stages.targets.info import read_target_info

    info = read_target_info(target)
    if not info.chat_template:
        raise DraftsmithError(f"{info.source} has no chat template to be trained on in: choose a chat model as target")


def run(ctx: StageContext, config: ProceduralTargetConfig) -> None:
    """Train it, then describe it as stage `target` does. An interrupted training goes on from its last checkpoint."""
    from draftsmith.stages.targets.info import model_path, read_target_info, write_target_info
    from draftsmith.stages.targets.resolve import describe

    def on_step(step: int, loss: float) -> None:
        ctx.progress(step, config.steps, "steps", loss=loss)
        if step % _METRICS_EVERY == 0:
            ctx.metrics(step, loss=loss)
        ctx.check_interrupted()

    def resumed(step: int) -> None:
        ctx.rewind_metrics(step + 1)
        if step:
            ctx.log(f"continuing from the checkpoint at step {step} of {config.steps}")

    source, parent = f"procedural:{'+'.join(config.families)}", None
    dtype: Dtype = "float32"
    if "target" in ctx.inputs:
        preflight(config, ctx.inputs["target"])
        earlier = read_target_info(ctx.inputs["target"])
        parent, dtype = model_path(ctx.inputs["target"]), earlier.dtype
        source = f"{earlier.source}, then {source}"
    kept = Kept(ctx.work, resumed, ctx.log)
    loss = train_target(ctx.out / _MODEL, config, config.shape, parent=parent, dtype=dtype, on_step=on_step, kept=kept)
    described = TargetConfig(source=source, dtype=dtype)
    info = describe(ctx.out / _MODEL, described, kind="folder", location=_MODEL, revision=None)
    write_target_info(info, ctx.out)
    ctx.summary(loss_nats=loss, layers=info.num_layers, hidden_size=info.hidden_size, vocab_size=info.vocab_size)


STAGE = Stage(
    name="procedural_target",
    config=ProceduralTargetConfig,
    inputs=("target?",),
    run=run,
    preflight=preflight,
    compute=Compute.HEAVY,
)
