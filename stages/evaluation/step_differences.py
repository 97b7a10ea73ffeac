"""Why a served drafter's acceptance is not that of replay: which one change of replay explains the served steps.

An engine that loads a drafter wrongly still gives the target's answers, so nothing fails: it is only slower than it
should be. Replay of the served answers, with one thing changed at a time (layer ids, rotary settings, mask token,
context, block size), shows the served steps again where the engine does just that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from draftsmith.artifacts.tables.parquet import to_table
from draftsmith.artifacts.tables.schemas import TRACE
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter, FeatureContext
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.parity import ParityTolerance, check_steps, trace_rows
from draftsmith.stages.replay.replayer import Replayer, samples_proposals
from draftsmith.stages.replay.stats import replay_sequentially
from draftsmith.stages.replay.trace import Trace
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.sampling import GREEDY, SamplingParams

THETAS = (10_000.0, 500_000.0, 1_000_000.0, 5_000_000.0)  # of public models; the first is what libraries fall back to
SHORTEST_WINDOW = 8
EXPLAINS = 0.5  # a change that leaves more than this share of the contradicted steps explains nothing


@dataclass(frozen=True)
class Served:
    """What an engine did."""

    trajectories: Sequence[Trajectory]  # its answers
    counts: Sequence[int]  # verify steps of each
    steps: pa.Table | None = None  # TRACE, where the engine records it
    sampling: SamplingParams = GREEDY  # that the answers were drawn with


@dataclass(frozen=True)
class Change:
    """One thing that an engine may do otherwise than replay."""

    cause: str
    text: str  # what it would do
    apply: Callable[[Drafter], Drafter] = lambda drafter: drafter
    block_size: int | None = None
    window: int | None = None  # positions of the context that are seen


@dataclass(frozen=True)
class Explained:
    """How far replay with a change is from what was served."""

    change: Change
    mismatch: float  # share of verify steps that differ; without recorded steps, of their number
    tau: float

    def row(self) -> dict[str, Any]:
        return {"cause": self.change.cause, "change": self.change.text, "mismatch": self.mismatch, "tau": self.tau}


@dataclass(frozen=True)
class Diagnosis:
    """What was found; `causes` is empty where served and replayed steps agree, or where no change explains them."""

    served_tau: float
    as_it_is: Explained
    tried: list[Explained] = field(default_factory=list)  # best first
    causes: list[Explained] = field(default_factory=list)
    agrees: bool = False

    @property
    def sentence(self) -> str:
        asis = self.as_it_is
        figures = f"tau {self.served_tau:.3f} as served, {asis.tau:.3f} in replay, {asis.mismatch:.1%} of steps differ"
        if self.agrees:
            return f"the engine drafts as replay does: {figures}"
        if not self.causes:
            return (
                f"{figures}; no single change of layer ids, rotary settings, mask token, context or block size "
                "explains it: the engine serves another checkpoint, or other weights of it"
            )
        found = " or ".join(f"{each.change.cause}: {each.change.text}" for each in self.causes)
        return f"{figures}; {found} (then {self.causes[0].mismatch:.1%} differ)"


def diagnose(
    target: Target,
    drafter: Drafter,
    served: Served,
    drafting: DraftingConfig,
    *,
    allowed: float,
    served_block: int | None = None,
    special_ids: Sequence[int] = (),
    progress: Callable[[int, int], Any] = lambda _done, _total: None,
) -> Diagnosis:
    """Replay what was served as it should have been, then with each change.

    allowed: share of steps that may differ for near-ties. served_block: what the engine says that it drafts, if it
    does. special_ids: of the tokenizer, which an engine might take for the mask token.
    """
    tokens = sum(t.answer_length - 1 for t in served.trajectories)
    served_tau = tokens / max(1, sum(served.counts))
    asis = _explained(target, drafter, served, drafting, Change("nothing", "as it is"))
    if asis.mismatch <= allowed:
        return Diagnosis(served_tau, asis, agrees=True)
    longest = max(len(t.tokens) for t in served.trajectories)
    changes = list(changes_of(drafter, target, longest, served_block, special_ids, drafting))
    if samples_proposals(drafter, served.sampling):  # a window is tried block by block, where proposals are argmaxes
        changes = [change for change in changes if change.window is None]
    tried = []
    for done, change in enumerate(changes):
        tried.append(_explained(target, drafter, served, drafting, change))
        progress(done + 1, len(changes))
    tried.sort(key=lambda each: each.mismatch)
    bound = min(max(allowed, tried[0].mismatch), EXPLAINS * asis.mismatch) if tried else 0.0
    causes = [each for each in tried if each.mismatch <= min(bound, tried[0].mismatch + 0.02)]
    return Diagnosis(served_tau, asis, tried, causes)


def changes_of(
    drafter: Drafter,
    target: Target,
    longest: int,
    served_block: int | None,
    special_ids: Sequence[int],
    drafting: DraftingConfig,
) -> Iterator[Change]:
    """What is tried for this drafter, answers of at most `longest` positions."""
    ids, layers = list(drafter.target_layer_ids), target.info.num_layers
    for text, other in (
        ("each one layer higher", [k + 1 for k in ids]),
        ("each one layer lower", [k - 1 for k in ids]),
        ("in reverse order", ids[::-1]),
    ):
        if other != ids and min(other) >= 0 and max(other) < layers:
            yield Change("other layer ids", f"{other} instead of {ids}, {text}", _with_layers(other))
    rope = dict(drafter.config.rope_parameters)  # type: ignore[union-attr,arg-type]
    own = float(rope["rope_theta"])
    for theta in THETAS:
        if theta != own:
            changed = {**rope, "rope_theta": theta}
            yield Change("other rotary settings", f"rope_theta {theta:g} instead of {own:g}", _with_rope(changed))
    if rope.get("rope_type", "default") != "default":
        plain = {"rope_type": "default", "rope_theta": own}
        yield Change("other rotary settings", f"without the scaling {rope['rope_type']}", _with_rope(plain))
    if isinstance(drafter, DFlashDrafter):
        mask = drafter.mask_token_id
        for token in dict.fromkeys([0, *special_ids, target.info.vocab_size - 1]):
            if token != mask:
                text = f"{token} instead of {mask}"
                yield Change("another mask token", text, _with_mask(token))
        window = SHORTEST_WINDOW
        while window < longest:
            yield Change("truncated context", f"it sees {window} positions at most", window=window)
            window *= 2
    block = drafting.block_size or drafter.block_size
    if served_block is not None and served_block != block:
        yield Change("another block size", f"{served_block} instead of {block}", block_size=served_block)


def _explained(target: Target, drafter: Drafter, served: Served, drafting: DraftingConfig, change: Change) -> Explained:
    changed = change.apply(drafter)
    if change.block_size is not None:
        drafting = drafting.model_copy(update={"block_size": change.block_size})
    if change.window is not None:
        traces = _in_window(target, changed, served.trajectories, drafting, change.window)
    else:
        replayer = Replayer(target, ReplayOptions(drafting, served.sampling))
        traces = replayer.traces({"it": changed}, served.trajectories)["it"]
    replayed = np.array([len(trace.anchors) for trace in traces])
    tau = sum(t.answer_length - 1 for t in served.trajectories) / int(replayed.sum())
    if served.steps is not None and served.steps.num_rows and not samples_proposals(drafter, served.sampling):
        gate = ParityTolerance("diagnosis", float32=False, greedy=True, allowed=1.0)
        rows = to_table(TRACE, trace_rows(served.trajectories, traces))
        return Explained(change, float(check_steps(gate, served.steps, rows)["mismatch_share"]), tau)
    apart = np.abs(np.asarray(served.counts) - replayed).sum() / replayed.sum()
    return Explained(change, float(apart), tau)


@torch.no_grad()
def _in_window(
    target: Target, drafter: Drafter, trajectories: Sequence[Trajectory], drafting: DraftingConfig, window: int
) -> list[Trace]:
    """Replay with a drafter that sees only the last `window` positions before each anchor, one block at a time."""
    head = drafter.drafting_head(target.head_weight, drafting.head_tokens)
    narrow: Any = _Narrow(drafter, window)
    traces = []
    for trajectory in trajectories:
        ids = torch.tensor([trajectory.tokens], device=target.device)
        features = target.features(ids, drafter.target_layer_ids)
        positions = torch.arange(ids.shape[1], device=target.device)[None]
        context = drafter.encode(features, ids, positions)
        block = drafting.block_size or drafter.block_size
        traces.append(replay_sequentially(narrow, context, trajectory, block, head))
    return traces


class _Narrow:
    """A DFlash drafter with a window."""

    def __init__(self, drafter: Drafter, window: int) -> None:
        self._drafter, self._window = drafter, window

    def propose(self, context: Context, tokens: torch.Tensor, anchors: torch.Tensor, *arguments: Any) -> torch.Tensor:
        assert isinstance(context, FeatureContext)
        return self._drafter.propose(replace(context, window=self._window), tokens, anchors, *arguments)


def _copy(drafter: Drafter, **attributes: Any) -> Drafter:
    """The same weights, other settings."""
    clone = copy.copy(drafter)
    clone._modules = dict(drafter._modules)  # a module that is replaced is replaced here alone
    for name, value in attributes.items():
        setattr(clone, name, value)
    return clone


def _with_mask(token: int) -> Callable[[Drafter], Drafter]:
    return lambda drafter: _copy(drafter, mask_token_id=token)


def _with_layers(ids: list[int]) -> Callable[[Drafter], Drafter]:
    return lambda drafter: _copy(drafter, target_layer_ids=ids)


def _with_rope(parameters: dict[str, Any]) -> Callable[[Drafter], Drafter]:
    def apply(drafter: Any) -> Drafter:
        config = copy.deepcopy(drafter.config)
        config.rope_parameters = parameters
        rotary = type(drafter.rotary)(config)
        return _copy(drafter, rotary=rotary.to(drafter.fc.weight.device))

    return apply
