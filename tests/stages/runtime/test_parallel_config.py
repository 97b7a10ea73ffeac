"""The division of a step over ranks, and configs of several processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.ranks import ALONE, Ranks
from draftsmith.stages.runtime.stage import RENDEZVOUS, ParallelConfig
from draftsmith.stages.targets.estimate import AnswerCounts, StageUse
from draftsmith.stages.training.config import OpdConfig, SftConfig
from draftsmith.stages.training.estimate import row_bytes, training_memory
from tests.flows.checks.test_memory import qwen_sizes


@pytest.mark.parametrize("count", [1, 2, 5, 8, 21])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_row_of_a_step_has_exactly_one_rank(count: int, world: int) -> None:
    lengths = np.random.default_rng([count, world]).integers(1, 5000, count).tolist()
    if count < world:
        with pytest.raises(ValueError, match="ranks"):
            Ranks(0, world).assigned_rows(lengths)
        return
    dealt = [Ranks(rank, world).assigned_rows(lengths) for rank in range(world)]
    assert sorted(row for rows in dealt for row in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) for rows in dealt)
    counts = [len(rows) for rows in dealt]
    assert max(counts) - min(counts) <= 1
    assert ALONE.assigned_rows(lengths) == list(range(len(lengths)))


def test_ranks_of_a_target_group_know_each_others_rows() -> None:
    lengths = [7, 5, 9, 4, 6, 8, 3]
    for rank in range(6):
        ranks = Ranks(rank, 6, 3)
        assert list(ranks.target_group) == [0, 1, 2] if rank < 3 else [3, 4, 5]
        assert ranks.target_group[ranks.target_index] == rank
        for other in ranks.target_group:
            assert ranks.assigned_rows(lengths, other) == Ranks(other, 6).assigned_rows(lengths)


def test_long_answers_are_spread_over_the_ranks() -> None:
    lengths = [100, 4000, 200, 3900, 300, 3800]
    tokens = [sum(lengths[row] for row in Ranks(rank, 3).assigned_rows(lengths)) for rank in range(3)]
    assert tokens == [4100, 4100, 4100]


@pytest.mark.parametrize("config", [SftConfig, OpdConfig])
def test_the_number_of_processes_is_not_in_the_cache_key(config: Any) -> None:
    alone, several = config(), config(parallel={"processes": 8, "shard_optimiser": True})
    assert several.parallel.world == 8
    assert alone.key_material() == several.key_material()


def test_the_control_is_trained_by_as_many_processes_as_opd() -> None:
    opd = OpdConfig(parallel=ParallelConfig(processes=4))
    assert SftConfig().continued(opd).parallel == opd.parallel


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequences_per_step": 7, "parallel": {"processes": 4, "nodes": 2}}, "7 cannot be split over 8 processes"),
        ({"parallel": {"processes": 0}}, "processes"),
        ({"parallel": {"processes": 8, "target_parallel": 3}}, "8 processes cannot be divided into groups of 3"),
        ({"parallel": {"nodes": 2, "target_parallel": 2}}, "1 processes cannot be divided into groups of 2"),
    ],
)
def test_a_step_that_cannot_be_split_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SftConfig.model_validate(fields)


def test_nodes_meet_at_the_endpoint_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RENDEZVOUS, raising=False)
    nodes = ParallelConfig(nodes=2)
    with pytest.raises(DraftsmithError, match=f"{RENDEZVOUS} is not set"):
        nodes.endpoint()
    monkeypatch.setenv(RENDEZVOUS, "head:29400")
    assert nodes.endpoint() == ("head", 29400)
    monkeypatch.setenv(RENDEZVOUS, "head")
    with pytest.raises(DraftsmithError, match="is 'head'"):
        nodes.endpoint()


def test_the_memory_estimate_covers_a_process_share_of_a_step() -> None:
    """3 of 21 answers on each of 8 processes; AdamW's moments: 8 of 18 bytes a parameter under autocast."""
    sizes, answers = qwen_sizes(), AnswerCounts(longest=4608)
    layers = sizes.target.parameters - sizes.target.vocabulary * sizes.target.hidden
    sizes = replace(sizes, target=replace(sizes.target, divided=layers))

    def parts(**parallel: Any) -> dict[str, float]:
        config = SftConfig.model_validate({"sequences_per_step": 21, "parallel": parallel})
        return training_memory(config, StageUse(sizes, answers=answers))

    alone, shared, sharded = parts(), parts(processes=8), parts(processes=8, shard_optimiser=True)
    assert shared["features"] == pytest.approx(alone["features"] * 3 / 21)
    assert shared["next batch"] == 3 * 4608 * sizes.feature_bytes  # read while a step trains, on a GPU
    assert shared["activations"] == 3 * row_bytes(SftConfig(), sizes, 4608)
    assert alone["drafter with AdamW"] == shared["drafter with AdamW"] == 18 * sizes.drafter.parameters
    assert sharded["drafter with AdamW"] == 11 * sizes.drafter.parameters
    assert sharded["target"] == alone["target"]
    halves = parts(processes=8, target_parallel=2)
    assert halves["target"] == alone["target"] - layers  # bfloat16: two bytes each, of half of them
    assert "next batch" not in halves  # nor is it read
