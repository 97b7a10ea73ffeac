"""Config sections `sft`, `control` and `opd`: how a drafter is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.registry import KINDS, DrafterConfig
from draftsmith.stages.replay.options import TokensPerForward
from draftsmith.stages.runtime.stage import NOT_FETCHED, Config, NotInKey, ParallelConfig
from draftsmith.stages.training.loss_registry import LossConfig, LossName, PositionWeights, ResponseStream, loss_file

if TYPE_CHECKING:
    from draftsmith.stages.drafters.spec import TrainingRecipe


class OptimiserConfig(Config):
    """The optimiser, its schedule and its checkpoints."""

    steps: Annotated[int, Field(ge=1, description="optimiser steps")] = 1000
    learning_rate: Annotated[float, Field(gt=0, description="peak of the cosine schedule")] = 1e-3
    warmup_fraction: Annotated[float, Field(ge=0, lt=1, description="share of the steps with a linear warm-up")] = 0.05
    compute_dtype: Annotated[
        Literal["bfloat16", "float32"], Field(description="weights stay float32; bfloat16 = autocast")
    ] = "bfloat16"
    checkpoint_every: Annotated[
        int | None,
        Field(
            ge=1,
            description="steps between checkpoints; by default the first comes within a minute, and the next ones so "
            "that saving takes at most 2 % of the time",
        ),
        NotInKey(),
    ] = None
    # Not in the key, like micro-batches: several processes train the same as one, except for rounding.
    parallel: Annotated[ParallelConfig, NotInKey()] = ParallelConfig()


class LoraOptions(Config):
    """A low-rank adapter of a drafter's linear maps: W x becomes W x + B A x, and only A and B are trained."""

    rank: Annotated[int, Field(ge=1, description="rows of A and columns of B")]


class TrainingConfig(OptimiserConfig):
    """The answers, blocks and softmax of every step."""

    lora: Annotated[
        LoraOptions | None,
        Field(
            description="train a low-rank adapter of the drafter that the training starts from, and merge it into the "
            "drafter at the end; by default all weights are trained"
        ),
    ] = None
    sequences_per_step: Annotated[int, Field(ge=1, description="answers in each step, over all processes")] = 8
    anchors_per_sequence: Annotated[int, Field(ge=1, description="blocks trained in each answer of a step")] = 16
    head_tokens: Annotated[
        int | None,
        Field(
            ge=2,
            description="softmax over this many most frequent tokens, the tokens of the step's answers and "
            "`head_negatives` random others, not the whole vocabulary; OPD finds verify steps over them too",
        ),
    ] = None
    head_negatives: Annotated[int, Field(ge=0, description="random tokens next to those of `head_tokens`")] = 1024
    positions_per_chunk: Annotated[int, Field(ge=1, description="bounds the memory for logits")] = 512
    feature_memory_mb: Annotated[
        float,
        Field(
            gt=0,
            description="memory for the target features of all answers; if they do not fit, none are kept, and "
            "rounding differs. OPD then keeps the keys and values of a step's answers here, if they fit, and scores "
            "proposals on them instead of reading the answers again",
        ),
        NotInKey(),
    ] = 2048.0
    tokens_per_target_forward: TokensPerForward = 2048
    micro_batch_tokens: Annotated[
        int | None,
        Field(
            ge=1,
            description="tokens of answers and blocks that go through the drafter at once; a larger step is split, "
            "with the same loss except for rounding; by default as many as fit by the estimate of memory",
        ),
        NotInKey(),
    ] = None

    @model_validator(mode="after")
    def _every_process_has_an_answer(self) -> TrainingConfig:
        if self.sequences_per_step < self.parallel.world:
            raise ValueError(
                f"sequences_per_step: {self.sequences_per_step} cannot be split over {self.parallel.world} processes. "
                "Raise it, or lower parallel.processes or parallel.nodes."
            )
        return self


class SftConfig(TrainingConfig):
    """A loss at every offset of blocks after anchors anywhere in an answer, weighted by offset."""

    steps: Annotated[int, Field(ge=0, description="optimiser steps; 0: take the drafter of init_from as it is")] = 1000
    drafter: DrafterConfig = DFlashConfig()
    init_from: Annotated[
        str | None,
        Field(description="folder or hub id of a drafter in the layout that engines load; by default random weights"),
    ] = None
    init_revision: Annotated[
        str | None,
        Field(
            description="commit, tag or branch of a hub id in init_from; a branch means its commit in the hub's cache, "
            "else the newest on the hub"
        ),
    ] = None
    adopt: Annotated[
        bool, Field(description="continue from a drafter although it was made for another revision of the target")
    ] = False
    loss: Annotated[
        LossName,
        Field(
            description="auto is the loss of the architecture's authors: cross_entropy on the committed token for "
            "DFlash and DFlash2 (on sampled answers ce_l1 for DFlash2), ce_l1 for DSpark, forward_kl to the target's "
            "distribution for EAGLE-3 and native heads; MODULE:FUNCTION is a loss of your own"
        ),
    ] = "auto"
    gamma: Annotated[
        float | None,
        Field(
            gt=0,
            description="gamma of exponential weights; by default the authors': 7 for DFlash (blocks of 16), 4 for "
            "DSpark (of 8), 0.8 per step for EAGLE-3 and native heads",
        ),
    ] = None

    weights: Annotated[
        Literal["exponential", "d_pace"],
        Field(
            description="weights of a block's offsets k: exp(-(k-1)/gamma), or D-PACE's (arXiv 2605.18810), from the "
            "drafter's own confidence"
        ),
    ] = "exponential"

    @model_validator(mode="after")
    def _fits_together(self) -> SftConfig:
        if self.gamma is not None and self.weights != "exponential":
            raise ValueError("only `weights: exponential` reads gamma. Remove one of the two.")
        if self.steps == 0 and self.init_from is None and not self.adopt and not KINDS[self.drafter.kind].native:
            raise ValueError(
                "steps: 0 steps train nothing. Name a drafter in init_from, or train for at least one step."
            )
        # `steps: 0, adopt: true` without init_from adopts the stage's input
        for name in ("adopt", "init_revision"):
            if getattr(self, name) and self.init_from is None and not (name == "adopt" and self.steps == 0):
                raise ValueError(f"{name} needs a drafter in init_from. Name one, or remove {name}.")
        return self

    def stream(self, recipe: TrainingRecipe, *, sampled: bool = False) -> ResponseStream:
        """Return the resolved stream; fields that are not set come from the architecture's recipe.

        sampled: whether the answers were sampled.
        """
        return ResponseStream(
            loss=recipe.loss_on(sampled=sampled) if self.loss == "auto" else self.loss,
            scope="block",
            positions=PositionWeights(kind=self.weights, gamma=self.gamma or recipe.gamma),
        )

    def continued(self, like: TrainingConfig) -> SftConfig:
        """Return SFT that trains exactly like another training except for anchors and loss: the fair comparison.

        It starts from the drafter that is its input.
        """
        shared = {name: getattr(like, name) for name in TrainingConfig.model_fields}
        return self.model_copy(update={**shared, "init_from": None, "init_revision": None, "adopt": False})

    def check_lora(self, start: str | None, trained: str) -> None:
        """Raise DraftsmithError if some weights are new, so that an adapter has nothing to adapt there.

        start: kind of the drafter that the training starts from; None: random weights, or the target's for a native
        head. trained: kind that is trained.
        """
        if self.lora is None or start == trained or (start is None and KINDS[trained].native):
            return
        if start is None:
            raise DraftsmithError(
                "sft.lora: random weights have nothing to adapt. Name a drafter in sft.init_from, or remove lora."
            )
        raise DraftsmithError(
            f"sft.lora: the new parts of a {start} that becomes a {trained} have nothing to adapt. Set "
            f"sft.drafter.kind to {start}, or remove lora."
        )

    def external_files(self) -> list[Path]:
        """Return the files of the checkpoint in `init_from`, if it is a folder, and the source of a named loss."""
        source = [loss_file(self.loss)] if ":" in self.loss else []
        folder = Path(self.init_from).expanduser() if self.init_from else None
        if folder is None or not folder.is_dir():
            return source
        suffixes = {".json", ".safetensors", ".npy"}
        return source + sorted(path.absolute() for path in folder.iterdir() if path.suffix in suffixes)

    def external_versions(self) -> dict[str, str]:
        """Return the commit of the checkpoint that `init_from` names, if it is on the hub."""
        if self.init_from is None or Path(self.init_from).expanduser().is_dir():
            return {}
        from draftsmith.stages.targets.hub import hub_commit  # loads the hub's client, which planning seldom needs

        return {self.init_from: hub_commit(self.init_from, self.init_revision) or NOT_FETCHED}


class OpdConfig(TrainingConfig):
    """A loss from the target's feedback on verify steps, and the choice of the steps that are trained."""

    steps: Annotated[int, Field(ge=1, description="optimiser steps")] = 400
    learning_rate: Annotated[float, Field(gt=0, description="peak of the cosine schedule")] = 3e-4
    loss: Annotated[
        LossConfig,
        Field(
            description="matched: fits the verification rule and the architecture; paper: Bernoulli forward KL on "
            "committed tokens plus k3 reverse KL on the rejected suffix, pooled; or the streams in full"
        ),
    ] = LossConfig()
    anchors: Annotated[
        Literal["errors", "visited", "successors", "chains", "random"],
        Field(
            description="errors: mined verify steps that rejected something; visited: all mined steps; successors: "
            "where a verify step of the current weights leads from positions all over the answer; chains: such "
            "positions, and in three more rounds where the verify steps before lead, all of them trained; random: "
            "positions of the answer, whatever the drafter does there"
        ),
    ] = "successors"
    remine_every: Annotated[
        int | None,
        Field(
            ge=0,
            description="mine an answer again, with the current weights, when a step trains it and its trace is this "
            "many steps old; 0: train on the trace as it was mined; by default 1 for anchors errors and visited",
        ),
    ] = None

    @property
    def reads_table(self) -> bool:
        """Return whether anchors are steps of the mined table, which must then hold the steps of all answers."""
        return self.anchors in ("errors", "visited")

    @model_validator(mode="after")
    def _remines_a_trace(self) -> OpdConfig:
        if self.remine_every and not self.reads_table:
            raise ValueError(
                f"remine_every: anchors {self.anchors} use the current weights anyway. Set it to 0, or anchors to "
                "errors or visited."
            )
        return self

    @model_validator(mode="after")
    def _drafts_chains_as_it_trains(self) -> OpdConfig:
        if self.anchors == "chains" and self.loss.needs_scores:
            raise ValueError(
                "anchors: chains find their verify steps after the loss, and a rejected stream needs them for it. Set "
                "anchors to successors, or loss.rejected.loss to none."
            )
        return self

    def external_files(self) -> list[Path]:
        """Return the source of a named loss."""
        name = self.loss.response.loss
        return [loss_file(name)] if ":" in name else []

    @property
    def oldest_trace(self) -> int:
        """Return the age in steps at which a trace is mined again: `remine_every` or its default; 0: never."""
        if self.remine_every is not None:
            return self.remine_every
        return 1 if self.reads_table else 0
