"""Stage `procedural_target`: a small target for experiments, trained on procedural text; or a new revision of one.

Its artifact is that of stage `target`, so that every other stage takes it.
"""

from __future__ import annotations

from typing import Literal

from stages.contract import Stage, StageContext
from stages.procedural.training import ShapeConfig, TrainingTextConfig

_MODEL = "model"
_METRICS_EVERY = 10


class ProceduralTargetConfig(TrainingTextConfig):
    """What it is taught. With a target as input the training goes on from there, and the shape is that target's."""

    kind: Literal["procedural"] = "procedural"
    shape: ShapeConfig = ShapeConfig()


def run(ctx: StageContext, config: ProceduralTargetConfig) -> None:
    """Train it, then describe it as stage `target` does. An interrupted training (of minutes) starts again."""
    from stages.procedural.training import train_target
    from stages.targets.config import TargetConfig
    from stages.targets.resolve import describe, model_path, write_target_info

    def on_step(step: int, loss: float) -> None:
        ctx.check_interrupted()
        ctx.progress(step, config.steps, "steps", loss=loss)
        if step % _METRICS_EVERY == 0:
            ctx.metrics(step, loss=loss)

    ctx.rewind_metrics(0)
    parent = model_path(ctx.inputs["target"]) if "target" in ctx.inputs else None
    loss = train_target(ctx.out / _MODEL, config, config.shape, parent=parent, on_step=on_step)
    described = TargetConfig(source=f"procedural:{'+'.join(config.families)}", dtype="float32")
    info = describe(ctx.out / _MODEL, described, kind="folder", location=_MODEL, revision=None)
    write_target_info(info, ctx.out)
    ctx.summary(loss_nats=loss, layers=info.num_layers, hidden_size=info.hidden_size, vocab_size=info.vocab_size)


STAGE = Stage(name="procedural_target", config=ProceduralTargetConfig, inputs=("target?",), run=run)
