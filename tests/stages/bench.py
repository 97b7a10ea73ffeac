"""The tiny target and drafters, loaded once in float32, with prompts whose greedy answers have no near-ties."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from draftsmith.stages.data.stored_prompts import Prompt, load_prompts
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, Trajectory, pad_tokens
from draftsmith.stages.drafters.base import Context, Drafter, PreparedDrafter
from draftsmith.stages.drafters.checkpoint import create_drafter, load_drafter
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.chains import replay_chains, replay_sequentially
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.causal_lm import Target, TargetOutput
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from tests.testbed import cache, ties
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.target import MASK

GREEDY_TOKENS = 80  # about half of the answers stop before, the others are cut
CAPACITY = 256


@dataclass(frozen=True)
class Bench:
    """The target, drafters and prompts for tests of engines, replay and scoring."""

    target: Target
    drafters: dict[str, Drafter]  # "trained" (tau above 2) and "untrained" (random weights)
    prompts: list[Prompt]  # held-out, more than 50
    greedy: dict[str, list[int]]  # prompt id -> plain greedy answer of GREEDY_TOKENS tokens at most

    def requests(
        self,
        count: int | None = None,
        max_new_tokens: int = GREEDY_TOKENS,
        sampling: SamplingParams = GREEDY,
        seed: int = 0,
    ) -> list[Request]:
        """Return one request for each of the first `count` prompts, each with another seed."""
        return [
            Request(p.prompt_id, p.token_ids, max_new_tokens, sampling, 1000 * seed + i)
            for i, p in enumerate(self.prompts[:count])
        ]

    def engine(self, drafter: str | None = None, slots: int = 8, **drafting: int | None) -> EmbeddedEngine:
        return EmbeddedEngine(
            self.target,
            self.drafters[drafter] if drafter else None,
            slots=slots,
            capacity=CAPACITY,
            drafting=DraftingConfig(**drafting),
        )

    def answers(
        self, requests: Sequence[Request], drafter: str | None = None, slots: int = 8, **drafting: int | None
    ) -> dict[str, Completion]:
        """Return completions by request id."""
        done = self.engine(drafter, slots, **drafting).generate(requests)
        return {completion.request.request_id: completion for completion in done}

    def answered(self, count: int | None = None) -> list[Trajectory]:
        """Return the first `count` prompts with their greedy answers, decoded without a drafter."""
        return [
            Trajectory(p.prompt_id, p.token_ids + self.greedy[p.prompt_id], len(p.token_ids))
            for p in self.prompts[:count]
        ]

    def read(self, trajectories: Sequence[Trajectory], drafter: Drafter) -> tuple[TargetOutput, Context]:
        """Return the target's forward over right-padded trajectories, and the drafter's context of it."""
        ids = pad_tokens(trajectories, self.target.device)
        out = self.target.read(ids, drafter.target_layer_ids)
        assert out.features is not None
        positions = torch.arange(ids.shape[1]).expand(len(trajectories), -1)
        with torch.no_grad():
            return out, drafter.encode(out.features, ids, positions)

    def clear(self, trajectories: Sequence[Trajectory], drafter: Drafter, **drafting: int | None) -> list[Trajectory]:
        """Return the trajectories on which no proposal of the drafter depends on a near-tie."""
        return [t for t in trajectories if ties.draft_margin(self.target, drafter, t, **drafting) > ties.DRAFT_TIE]

    def clearly_drawn(self, requests: Sequence[Request], answers: Mapping[str, Completion]) -> list[Request]:
        """Return the requests whose sampled answers do not depend on a random number close to another token's."""
        return [
            request
            for request in requests
            if ties.draw_margin(self.target, answers[request.request_id].trajectory(), request.sampling, request.seed)
            > ties.DRAW_TIE
        ]

    def with_drafters(self, drafters: dict[str, Drafter]) -> Bench:
        """Return the bench with other drafters, and only the prompts whose answers have no near-tie of theirs."""
        answered = self.answered()
        for drafter in drafters.values():
            answered = self.clear(answered, drafter)
        kept = {trajectory.trajectory_id for trajectory in answered}
        return self.with_answers(drafters, {name: answer for name, answer in self.greedy.items() if name in kept})

    def with_answers(self, drafters: dict[str, Drafter], greedy: dict[str, list[int]]) -> Bench:
        """Return the bench with other drafters, and the prompts with these greedy answers."""
        prompts = [prompt for prompt in self.prompts if prompt.prompt_id in greedy]
        return replace(self, drafters=drafters, prompts=prompts, greedy=greedy)

    def replay(
        self,
        trajectories: Sequence[Trajectory],
        drafter: str,
        chains: int | None,
        block_size: int | None = None,
        head_tokens: int | None = None,
    ) -> list[Steps]:
        """Replay all trajectories in one batch."""
        model = self.drafters[drafter]
        head = model.drafting_head(self.target.head_weight, head_tokens)
        context = self.read(trajectories, model)[1]
        return replay_chains(
            PreparedDrafter(model, head, block_size or model.block_size), context, trajectories, chains
        )

    def sequential_traces(
        self,
        trajectories: Sequence[Trajectory],
        drafter: str,
        block_size: int | None = None,
        head_tokens: int | None = None,
    ) -> list[Steps]:
        """Return the traces of the sequential reference, one trajectory at a time."""
        model = self.drafters[drafter]
        head = model.drafting_head(self.target.head_weight, head_tokens)
        return [
            replay_sequentially(model, self.read([t], model)[1], t, block_size or model.block_size, head)
            for t in trajectories
        ]


def tau(traces: Sequence[Steps]) -> float:
    """Return the acceptance length as a plain ratio of sums; NaN without a step."""
    steps = sum(len(t.anchors) for t in traces)
    return float(sum(t.expected_committed.sum() for t in traces) / steps) if steps else float("nan")


def assert_same(ours: Sequence[Steps], reference: Sequence[Steps]) -> None:
    for trace, expected in zip(ours, reference, strict=True):
        assert trace.length == expected.length
        np.testing.assert_array_equal(trace.anchors, expected.anchors)
        np.testing.assert_array_equal(trace.accepted, expected.accepted)
        np.testing.assert_array_equal(trace.proposed, expected.proposed)


def step_rows(steps: Steps | None) -> list[tuple[int, int, list[int]]]:
    """Return anchor, accepted proposals and proposals of each step; none for an answer without recorded steps."""
    if steps is None:
        return []
    return list(zip(steps.anchors.tolist(), steps.accepted.tolist(), steps.proposed.tolist(), strict=True))


def assert_recorded(traces: Sequence[Steps], completions: Sequence[Completion]) -> None:
    """Assert that the traces equal the verify steps that an engine recorded."""
    for trace, completion in zip(traces, completions, strict=True):
        assert step_rows(completion.steps) == step_rows(trace)


def cached_answers(name: str, made_of: str, decode: Callable[[], Bench]) -> dict[str, list[int]]:
    """Return the greedy answers of a bench by prompt. They are cached, since every test worker needs them.

    made_of: names the artifacts of target and drafters.
    """
    from tests.stages import bench

    def build(folder: Path) -> None:
        (folder / "answers.json").write_text(json.dumps(decode().greedy))

    folder = cache.cached(name, build, code=(bench, ties), extra=made_of)
    answers: dict[str, list[int]] = json.loads((folder / "answers.json").read_text())
    return answers


def build_bench(made: DrafterArtifacts) -> Bench:
    target = Target.load(made.target)
    untrained = create_drafter(
        DFlashConfig(num_layers=2, block_size=6, target_layer_ids=(0, 2), mask_token=MASK), target, seed=3
    )
    trained = load_drafter(made.drafter / DRAFTER_FOLDER, target)
    untrained.frequent_tokens = trained.frequent_tokens
    # there without the target's own near-ties
    prompts = list(load_prompts(made.prompts, ["heldout", "validation"]))
    plain, drafters = Bench(target, {}, prompts, {}), {"trained": trained, "untrained": untrained.eval()}

    def decode() -> Bench:
        answers = plain.answers(plain.requests(), slots=32)
        plain.greedy.update({name: completion.response_ids for name, completion in answers.items()})
        return plain.with_drafters(drafters)

    bench = plain.with_answers(drafters, cached_answers("answers-tiny", made.root.name, decode))
    assert len(bench.prompts) > 50
    return bench
