"""The parity gate on blocks of 15 proposals in bfloat16: a correct engine passes, one with an error is refused.

Served and replayed steps are walked from a drafter's logits, with noise of their own on either side. The noise is as
large as the most that was seen of a correct engine: 18 % of the steps with 7 proposals have another one. So a correct
engine may be refused in 1 of 100 simulations, and one with an error must be refused in 99. The logits are those of the
shipped drafter, or drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import to_table
from draftsmith.artifacts.tables.schemas import TRACE
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.replay.options import PARITY_MISMATCH
from draftsmith.stages.replay.parity import ParityTolerance, check_steps, check_tau
from tests.stages.bench import Bench
from tests.stages.evaluation.test_step_differences import with_attribute, with_theta

BF16 = ParityTolerance("mining", float32=False, greedy=True, allowed=PARITY_MISMATCH)
EVERY_PROPOSAL = ParityTolerance("mining", float32=True, greedy=False, allowed=PARITY_MISMATCH)
SEEN = 0.18  # of the steps with 7 proposals: in bfloat16, of a drafter that was hardly trained
PROPOSALS = 15
ANSWERS = 16  # with 10 steps each; an evaluation's 8 answers are longer
SIMULATIONS, MISTAKES = 100, 1
BEST = 6  # logits of each proposal that the noise can make the highest
VOCABULARY = 900
HARD = 0.15  # share of the tokens of a drawn answer that no block proposes
DISTANCE = np.linspace(6.0, 1.5, PROPOSALS)  # of drawn logits, by offset: the mean distance of the best ones


@dataclass(frozen=True)
class Blocks:
    """The best logits of the blocks after all anchors of an answer, and their tokens: [anchors, proposals, BEST]."""

    trajectory: Trajectory
    logits: np.ndarray
    tokens: np.ndarray

    @classmethod
    @torch.no_grad()
    def of(cls, bench: Bench, drafter: Drafter, trajectory: Trajectory) -> Blocks:
        ids = torch.tensor([trajectory.tokens])
        anchors = torch.arange(trajectory.first_anchor, trajectory.last_anchor + 1)[None]
        context = bench.read([trajectory], drafter)[1]
        tokens = ids[0][anchors][..., None].expand(-1, -1, PROPOSALS)
        hidden = drafter.block_hidden(context, tokens, anchors)
        best = drafter.drafting_head(bench.target.head_weight, None).logits(hidden)[0].topk(BEST, -1)
        return cls(trajectory, best.values.numpy(), best.indices.numpy())

    @classmethod
    def drawn(cls, name: str, rng: np.random.Generator) -> Blocks:
        """Return blocks of an answer of 100 tokens."""
        trajectory = Trajectory(name, rng.integers(VOCABULARY, size=120).tolist(), 20)
        anchors = np.arange(trajectory.first_anchor, trajectory.last_anchor + 1)
        shape = (len(anchors), PROPOSALS, BEST)
        logits = -rng.exponential(DISTANCE[:, None], shape).cumsum(-1)
        tokens = rng.integers(VOCABULARY, size=shape[:2])[..., None] + np.arange(BEST)  # different ones
        ahead = np.minimum(anchors[:, None] + np.arange(1, PROPOSALS + 1), len(trajectory.tokens) - 1)
        right = np.array(trajectory.tokens)[ahead]
        hard = rng.random(len(trajectory.tokens)) < HARD
        tokens[..., 0] = np.where(hard[ahead], tokens[..., 0], right)
        return cls(trajectory, logits, tokens)

    def steps(self, noise: float, rng: np.random.Generator, proposals: int = PROPOSALS) -> pa.Table:
        """Return the verify steps (TRACE) of an engine whose logits have this noise."""
        logits = self.logits[:, :proposals]
        chosen = (logits + noise * rng.standard_normal(logits.shape)).argmax(-1)
        proposed = np.take_along_axis(self.tokens[:, :proposals], chosen[..., None], -1)[..., 0]
        first, length = self.trajectory.first_anchor, len(self.trajectory.tokens)
        committed = np.append(self.trajectory.tokens, np.full(proposals, -1))
        ahead = np.arange(first, first + len(proposed))[:, None] + np.arange(1, proposals + 1)
        accepted = (proposed == committed[ahead]).cumprod(1).sum(1)
        anchors, anchor = [], first
        while anchor < length - 1:
            anchors.append(anchor)
            anchor += int(accepted[anchor - first]) + 1
        at = np.array(anchors) - first
        return to_table(
            TRACE,
            pa.table(
                {
                    "trajectory_id": [self.trajectory.trajectory_id] * len(at),
                    "step": np.arange(len(at)),
                    "anchor": np.array(anchors),
                    "accepted": accepted[at],
                    "proposed_ids": list(proposed[at]),
                    "target_logprobs": pa.nulls(len(at), pa.list_(pa.float32())),
                }
            ),
        )


@pytest.fixture(scope="module")
def replayed(bench: Bench) -> list[Blocks]:
    return [Blocks.of(bench, bench.drafters["trained"], trajectory) for trajectory in bench.answered(40)]


@pytest.fixture(scope="module")
def noise(replayed: list[Blocks]) -> float:
    return noise_of(replayed)


def noise_of(replayed: Sequence[Blocks]) -> float:
    """Return the noise with which `SEEN` of the steps with 7 proposals differ in some proposal."""
    low, high = 0.0, 1.0
    for _ in range(8):
        level = (low + high) / 2
        rng = np.random.default_rng(0)
        served, again = (pa.concat_tables([b.steps(level, rng, 7) for b in replayed]) for _ in range(2))
        share = check_steps(ParityTolerance("", float32=True, greedy=False, allowed=1.0), served, again)
        low, high = (level, high) if share["mismatch_share"] < SEEN else (low, level)
    return low


def refusals(
    served: Sequence[Blocks], replayed: Sequence[Blocks], noise: float, tolerance: ParityTolerance = BF16
) -> int:
    """Return in how many of the simulations the gate refuses."""
    rng, refused = np.random.default_rng(1), 0
    for _ in range(SIMULATIONS):
        answers = rng.choice(len(replayed), ANSWERS, replace=False)
        ours, theirs = ([blocks[i].steps(noise, rng) for i in answers] for blocks in (served, replayed))
        committed = [replayed[i].trajectory.answer_length - 1 for i in answers]
        counts = [np.array([table.num_rows for table in tables]) for tables in (ours, theirs)]
        try:
            check_steps(tolerance, pa.concat_tables(ours), pa.concat_tables(theirs))
            check_tau(tolerance, np.array(committed), *counts)
        except DraftsmithError:
            refused += 1
    return refused


@pytest.mark.shipped
def test_a_correct_engine_passes(replayed: list[Blocks], noise: float) -> None:
    assert refusals(replayed, replayed, noise) <= MISTAKES


def test_a_correct_engine_passes_since_only_decisive_proposals_count() -> None:
    """By all 15 it would be refused: 18 % of blocks of 7 change, so of 15 at least 1 - 0.82^(15/7) = 35 %."""
    rng = np.random.default_rng(2)
    blocks = [Blocks.drawn(f"p{i}", rng) for i in range(40)]
    noise = noise_of(blocks)
    assert refusals(blocks, blocks, noise) <= MISTAKES
    assert refusals(blocks, blocks, noise, EVERY_PROPOSAL) >= SIMULATIONS / 10


def with_layers_one_higher(drafter: Any) -> Drafter:
    return with_attribute("target_layer_ids", [k + 1 for k in drafter.target_layer_ids])(drafter)


@pytest.mark.parametrize(
    "wrong",
    [
        # what a neighbouring layer tells a drafter depends on the target
        pytest.param(with_layers_one_higher, marks=pytest.mark.shipped),
        with_theta(500_000.0),
        with_attribute("mask_token_id", 0),
    ],
    ids=["layer ids", "rotary", "mask token"],
)
def test_an_engine_with_an_error_is_refused(
    bench: Bench, replayed: list[Blocks], noise: float, wrong: Callable[[Drafter], Drafter]
) -> None:
    drafter = wrong(bench.drafters["trained"])
    served = [Blocks.of(bench, drafter, blocks.trajectory) for blocks in replayed]
    assert refusals(served, replayed, noise) >= SIMULATIONS - MISTAKES
