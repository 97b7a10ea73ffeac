"""Body of stage `diagnosis`: finds the one change of replay that explains the steps that an engine served.

An engine that loads a drafter wrongly still gives the target's answers, so nothing fails: it is only slower than it
should be. Replay of the served answers with one thing changed at a time (layer ids, rotary settings, mask token,
context, block size) reproduces the served steps if the engine makes this change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, StageInterrupted
from draftsmith.artifacts.results.evaluation import DiagnosisResult, ReplayChange
from draftsmith.artifacts.tables.schemas import TRACE
from draftsmith.stages.data.stored_prompts import Prompt, load_prompts, positions_needed
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter, FeatureContext
from draftsmith.stages.drafters.mtp.model import MtpDrafter
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Completion, Request, recorded_table
from draftsmith.stages.engines.config import ServerEngineConfig
from draftsmith.stages.engines.registry import identify, open_servers
from draftsmith.stages.engines.servers.requirements import server_requirements
from draftsmith.stages.evaluation.diagnosis.stage import DiagnosisConfig
from draftsmith.stages.replay.chains import replay_sequentially
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.parity import ParityTolerance, check_steps
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.sampled import samples_proposals
from draftsmith.stages.replay.step_tables import steps_table
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.runtime.stage import StageContext, progress_callback
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import read_target_info
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams

THETAS = (10_000.0, 500_000.0, 1_000_000.0, 5_000_000.0)  # of public models; the first is the libraries' default
SHORTEST_WINDOW = 8
_INPUTS = {  # field of a head's `Reading` -> what an engine may add
    "target_normed": "the target's final norm before the head",
    "own_normed": "the head's norm on its own states",
    "zeroes_first": "a zero embedding at position 0",
}
EXPLAINS = 0.5  # a change explains nothing if more than this share of the contradicted steps is left


def run(ctx: StageContext, config: DiagnosisConfig) -> None:
    """Write `diagnosis.json`: a sentence, and the tried changes."""
    engine, block_size = identify(config.url, config.api_key_env)
    prompts = load_prompts(ctx.inputs["prompts"], ("validation", "heldout"))[: config.prompts]
    most = read_target_info(ctx.inputs["target"]).max_positions
    longest = positions_needed(prompts, config.sampling.max_new_tokens, most)
    try:
        answers = _ask(ctx, config, engine, DraftingConfig(block_size=block_size), prompts, longest)
    except (RetryableError, StageInterrupted):
        raise
    except DraftsmithError as error:  # the server itself names the error
        causes = [ReplayChange(cause="reported by the server")]
        _write(ctx, DiagnosisResult(sentence=str(error), agrees=False, causes=causes))
        return
    answers = [answer for answer in answers if len(answer.response_ids) >= 2]
    if not answers:
        raise DraftsmithError("diagnosis: no answer of two or more tokens. Raise sampling.max_new_tokens.")
    target = Target.load(ctx.inputs["target"])
    served = ServedAnswers(
        [answer.trajectory() for answer in answers],
        [answer.verify_steps for answer in answers],
        recorded_table(answers),
        config.sampling.params(),
        block_size,
    )
    drafter = load_drafter(Path(config.drafter), target)
    allowed, progress = config.max_parity_mismatch, progress_callback(ctx, "changes")
    _write(ctx, diagnose(target, drafter, served, allowed=allowed, progress=progress))


def _ask(
    ctx: StageContext,
    config: DiagnosisConfig,
    engine: ServerEngineConfig,
    drafting: DraftingConfig,
    prompts: Sequence[Prompt],
    longest: int,
) -> list[Completion]:
    """Return the server's answers. longest: positions of the longest request.

    Raises DraftsmithError if the server does not fit the drafter.
    """
    required = server_requirements(engine, ctx.inputs["target"], Path(config.drafter), drafting, longest)
    with open_servers(engine, required, ctx.work, ctx.log, ctx.check_interrupted) as server:
        sampling = config.sampling.params()
        max_new = config.sampling.max_new_tokens
        requests = [Request(p.prompt_id, p.token_ids, max_new, sampling, ctx.seed) for p in prompts]
        answers = []
        for answer in server.generate(requests):
            answers.append(answer)
            ctx.progress(len(answers), len(requests), "answers")
            ctx.check_interrupted()
    return answers


def _write(ctx: StageContext, result: DiagnosisResult) -> None:
    result.write(ctx.out)
    ctx.log(result.sentence)


@dataclass(frozen=True)
class ServedAnswers:
    """The answers of an engine, and its verify steps."""

    trajectories: Sequence[Trajectory]
    counts: Sequence[int]  # verify steps per answer
    steps: pa.Table | None = None  # TRACE, if the engine records it
    sampling: SamplingParams = GREEDY
    block_size: int | None = None  # as reported by the engine, if it reports it


@dataclass(frozen=True)
class Change:
    """One thing that an engine may do differently from replay."""

    cause: str
    text: str
    apply: Callable[[Drafter], Drafter] = lambda drafter: drafter
    block_size: int | None = None
    window: int | None = None  # number of context positions that the drafter sees


def diagnose(
    target: Target,
    drafter: Drafter,
    served: ServedAnswers,
    *,
    allowed: float,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> DiagnosisResult:
    """Replay the served answers with the drafter as it is, then with each change.

    allowed: share of steps that may differ through near-ties.
    """
    tokens = sum(t.answer_length - 1 for t in served.trajectories)
    served_tau = tokens / max(1, sum(served.counts))
    unchanged = _explained(target, drafter, served, Change("nothing", "as it is"))
    metrics = f"tau {served_tau:.3f} as served, {unchanged.tau:.3f} in replay, {unchanged.mismatch:.1%} of steps differ"
    result = DiagnosisResult(
        sentence=f"the engine drafts as replay does: {metrics}",
        agrees=unchanged.mismatch <= allowed,
        served_tau=served_tau,
        as_it_is=unchanged,
        causes=[],
        tried=[],
    )
    if result.agrees:
        return result
    changes = list(_changes(target, drafter, served))
    if samples_proposals(drafter, served.sampling):  # a window is only tried where proposals are argmaxes
        changes = [change for change in changes if change.window is None]
    tried = []
    for done, change in enumerate(changes):
        tried.append(_explained(target, drafter, served, change))
        progress(done + 1, len(changes))
    tried.sort(key=lambda candidate: candidate.mismatch)
    bound = min(max(allowed, tried[0].mismatch), EXPLAINS * unchanged.mismatch) if tried else 0.0
    causes = [change for change in tried if change.mismatch <= min(bound, tried[0].mismatch + 0.02)]
    sentence = (
        f"{metrics}; no single change that was tried explains it: "
        "the engine serves another checkpoint, or other weights of it"
    )
    if causes:
        named = " or ".join(f"{cause.cause}: {cause.change}" for cause in causes)
        sentence = f"{metrics}; {named} (then {causes[0].mismatch:.1%} differ)"
    return result.model_copy(update={"sentence": sentence, "causes": causes, "tried": tried})


def _changes(target: Target, drafter: Drafter, served: ServedAnswers) -> Iterator[Change]:
    """Yield the changes to try for this drafter."""
    ids, layers = list(drafter.target_layer_ids), target.info.num_layers
    for text, other in (
        ("each one layer higher", [k + 1 for k in ids]),
        ("each one layer lower", [k - 1 for k in ids]),
        ("in reverse order", ids[::-1]),
    ):
        if other != ids and min(other) >= 0 and max(other) < layers:
            yield Change("other layer ids", f"{other} instead of {ids}, {text}", partial(_copy, target_layer_ids=other))
    rope = dict(drafter.config.rope_parameters)
    trained = float(rope["rope_theta"])
    ropes = {
        f"rope_theta {theta:g} instead of {trained:g}": {**rope, "rope_theta": theta}
        for theta in THETAS
        if theta != trained
    }
    if rope.get("rope_type", "default") != "default":
        ropes[f"without the scaling {rope['rope_type']}"] = {"rope_type": "default", "rope_theta": trained}
    for text, parameters in ropes.items():
        yield Change("other rotary settings", text, partial(_with_rope, parameters=parameters))
    if isinstance(drafter, MtpDrafter):
        for name, does in _INPUTS.items():
            value = not getattr(drafter.reading, name)
            reading = replace(drafter.reading, **{name: value})
            text = f"{'with' if value else 'without'} {does}"
            yield Change("other inputs of the head", text, partial(_copy, reading=reading))
    if isinstance(drafter, DFlashDrafter):
        mask = drafter.mask_token_id
        # an engine might take a special token for the mask token
        for token in dict.fromkeys([0, *target.tokenizer.all_special_ids, target.info.vocab_size - 1]):
            if token != mask:
                text = f"{token} instead of {mask}"
                yield Change("another mask token", text, partial(_copy, mask_token_id=token))
        window = SHORTEST_WINDOW
        while window < max(len(t.tokens) for t in served.trajectories):
            yield Change("truncated context", f"it sees {window} positions at most", window=window)
            window *= 2
    if served.block_size is not None and served.block_size != drafter.block_size:
        text = f"{served.block_size} instead of {drafter.block_size}"
        yield Change("another block size", text, block_size=served.block_size)


def _explained(target: Target, drafter: Drafter, served: ServedAnswers, change: Change) -> ReplayChange:
    """Replay the served answers with a change, and compare the steps."""
    changed = change.apply(drafter)
    if change.window is not None:
        traces = _in_window(target, changed, served.trajectories, change.window)
    else:
        replayer = Replayer(target, ReplayOptions(DraftingConfig(block_size=change.block_size), served.sampling))
        traces = replayer.traces({"it": changed}, served.trajectories)["it"]
    replayed = np.array([len(trace) for trace in traces])
    tau = sum(t.answer_length - 1 for t in served.trajectories) / int(replayed.sum())
    if served.steps is not None and served.steps.num_rows and not samples_proposals(drafter, served.sampling):
        gate = ParityTolerance("diagnosis", float32=False, greedy=True, allowed=1.0)
        rows = steps_table(TRACE, zip(served.trajectories, traces, strict=True))
        mismatch = float(check_steps(gate, served.steps, rows)["mismatch_share"])
    else:
        mismatch = float(np.abs(np.asarray(served.counts) - replayed).sum() / replayed.sum())
    return ReplayChange(cause=change.cause, change=change.text, mismatch=mismatch, tau=tau)


@torch.no_grad()
def _in_window(target: Target, drafter: Drafter, trajectories: Sequence[Trajectory], window: int) -> list[Steps]:
    """Replay with a drafter that sees only the last `window` positions before each anchor, one block at a time."""
    head = drafter.drafting_head(target.head_weight, None)
    narrow: Any = _WindowedDrafter(drafter, window)
    traces = []
    for trajectory in trajectories:
        ids = torch.tensor([trajectory.tokens], device=target.device)
        features = target.features(ids, drafter.target_layer_ids)
        positions = torch.arange(ids.shape[1], device=target.device)[None]
        context = drafter.encode(features, ids, positions)
        traces.append(replay_sequentially(narrow, context, trajectory, drafter.block_size, head))
    return traces


class _WindowedDrafter:
    """A DFlash drafter that sees a window of its context."""

    def __init__(self, drafter: Drafter, window: int) -> None:
        self._drafter, self._window = drafter, window

    def propose(self, context: Context, tokens: torch.Tensor, anchors: torch.Tensor, *arguments: Any) -> torch.Tensor:
        assert isinstance(context, FeatureContext)
        return self._drafter.propose(replace(context, window=self._window), tokens, anchors, *arguments)


def _copy(drafter: Drafter, **attributes: Any) -> Drafter:
    """Return a drafter with the same weights and these attributes."""
    clone = copy.copy(drafter)
    clone._modules = dict(drafter._modules)  # so that replacing a module leaves the original as it is
    for name, value in attributes.items():
        setattr(clone, name, value)
    return clone


def _with_rope(drafter: Any, parameters: dict[str, object]) -> Drafter:
    config = copy.deepcopy(drafter.config)
    config.rope_parameters = parameters
    rotary = type(drafter.rotary)(config)
    return _copy(drafter, rotary=rotary.to(next(drafter.parameters()).device))
