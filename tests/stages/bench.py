"""The tiny target and drafters, loaded once in float32, with prompts whose greedy answers hold no near-tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.checkpoint import create_drafter, load_drafter
from draftsmith.stages.drafters.config import DFlashConfig, DraftingConfig
from draftsmith.stages.engines.base import Completion, Request, SamplingParams
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.sequential import replay_sequentially
from draftsmith.stages.replay.trace import Trace, Trajectory, pad_tokens
from draftsmith.stages.stored import DRAFTER_FOLDER, Prompt, load_prompts
from draftsmith.stages.targets.causal_lm import Target, TargetOutput
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.target import MASK

GREEDY_TOKENS = 80  # about half of the answers stop before, the others are cut
GREEDY = SamplingParams(GREEDY_TOKENS)
NEAR_TIE = 1e-3  # logits; kernels of other shapes differ by less than 1e-4
CAPACITY = 256


@dataclass(frozen=True)
class Bench:
    """What the tests of engines, replay and scoring decode with."""

    target: Target
    drafters: dict[str, Drafter]  # "trained" (tau above 2) and "untrained" (random weights)
    prompts: list[Prompt]  # held-out, more than 50
    greedy: dict[str, list[int]]  # prompt id -> plain greedy answer of GREEDY_TOKENS tokens at most

    def requests(self, count: int | None = None, params: SamplingParams = GREEDY, seed: int = 0) -> list[Request]:
        """One request for each of the first `count` prompts, each with a seed of its own."""
        return [
            Request(p.prompt_id, p.token_ids, params, seed=1000 * seed + i) for i, p in enumerate(self.prompts[:count])
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
        """Completions by request id."""
        done = self.engine(drafter, slots, **drafting).generate(requests)
        return {completion.request.request_id: completion for completion in done}

    def read(self, trajectories: Sequence[Trajectory], drafter: Drafter) -> tuple[TargetOutput, Context]:
        """The target's forward over trajectories, padded on the right, and the drafter's context of it."""
        ids = pad_tokens(trajectories, self.target.device)
        out = self.target.read(ids, drafter.target_layer_ids)
        assert out.features is not None
        positions = torch.arange(ids.shape[1]).expand(len(trajectories), -1)
        with torch.no_grad():
            return out, drafter.encode(out.features, ids, positions)

    def sequential_traces(
        self,
        trajectories: Sequence[Trajectory],
        drafter: str,
        block_size: int | None = None,
        head_tokens: int | None = None,
    ) -> list[Trace]:
        """The plain reference of replay, every trajectory read on its own."""
        model = self.drafters[drafter]
        head = model.drafting_head(self.target.head_weight, head_tokens)
        return [
            replay_sequentially(model, self.read([t], model)[1], t, block_size or model.block_size, head)
            for t in trajectories
        ]


def trajectory_of(completion: Completion) -> Trajectory:
    prompt = completion.request.prompt_ids
    return Trajectory(completion.request.request_id, prompt + completion.response_ids, len(prompt))


def build_bench(made: DrafterArtifacts, wanted: int = 56) -> Bench:
    target = Target.load(made.target)
    untrained = create_drafter(
        DFlashConfig(num_layers=2, block_size=6, target_layer_ids=(0, 2), mask_token=MASK), target, seed=3
    )
    trained = load_drafter(made.drafter / DRAFTER_FOLDER, target)
    untrained.frequent_tokens = trained.frequent_tokens
    bench = Bench(target, {"trained": trained, "untrained": untrained.eval()}, [], {})
    bench.prompts.extend(load_prompts(made.prompts, ["heldout", "validation"]))
    answers = bench.answers(bench.requests(), slots=32)
    bench.prompts[:] = [p for p in bench.prompts if _margin(target, answers[p.prompt_id]) > NEAR_TIE][:wanted]
    bench.greedy.update({p.prompt_id: answers[p.prompt_id].response_ids for p in bench.prompts})
    assert len(bench.prompts) > 50
    return bench


def _margin(target: Target, completion: Completion) -> float:
    """The smallest difference of the two best logits over an answer."""
    start = len(completion.request.prompt_ids) - 1
    tokens = completion.request.prompt_ids + completion.response_ids[:-1]
    best = target.logits(target.read(torch.tensor([tokens])).hidden[0, start:]).topk(2).values
    return float((best[:, 0] - best[:, 1]).min())
