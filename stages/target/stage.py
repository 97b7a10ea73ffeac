"""Stage `target`: resolves the target model once; the other stages read its `target.json` and load its folder."""

from __future__ import annotations

from draftsmith.stages.runtime.stage import Stage, StageContext
from draftsmith.stages.target.config import TargetConfig


def run(ctx: StageContext, config: TargetConfig) -> None:
    """Write `target.json` and `origin.json`, and for a GGUF source the dequantised model into `model/`."""
    from draftsmith.artifacts.home import home
    from draftsmith.artifacts.store.checksums import Checksums
    from draftsmith.stages.target.resolve import resolve_target

    info = resolve_target(config, ctx.out, ctx.log, Checksums(home()).sha256)
    ctx.log(
        f"target {info.source}: {info.architecture}, {info.num_layers} layers, hidden {info.hidden_size}, "
        f"vocabulary {info.vocab_size}, {info.dtype}"
        + ("" if info.quantisation is None else f", loaded from {info.quantisation} weights")
        + ("" if info.rewindable else "; recurrent layers: what a verify step committed is read twice")
        + ("" if info.chat_template else "; no chat template, prompts will be plain text")
    )
    ctx.summary(
        layers=info.num_layers,
        hidden_size=info.hidden_size,
        vocab_size=info.vocab_size,
        max_positions=info.max_positions,
    )


STAGE = Stage(
    name="target", config=TargetConfig, inputs=(), body=__name__,
    volatile=("metrics.jsonl", "origin.json", "elsewhere.json"),  # a model that moves is the same model
)  # fmt: skip
