"""What ranks send each other: NCCL on GPUs, gloo on the CPU. In a group of one process, and in one of two GPUs."""

from __future__ import annotations

import copy
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.runtime.launch import launch
from draftsmith.stages.runtime.ranks import Ranks, process_group
from draftsmith.stages.runtime.stage import ParallelConfig
from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.optimiser import make_optimiser, restore, whole_state
from tests.stages.runtime.trainings import Training, run_all
from tests.testbed import random_target
from tests.testbed.context import RecordingContext

# Sends as one of two ranks, and receives only from itself: sums have one term.
SENDING = Ranks(0, 2)


@pytest.fixture
def group(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make a group of this process, as from the launcher's environment; yield the device of its tensors."""
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    with process_group():
        yield device


def test_gathered_objects_gradients_and_weights_arrive(group: str) -> None:
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    assert (backends["cpu"], backends[group]) == ("gloo", "gloo" if group == "cpu" else "nccl")
    assert Ranks.current() == Ranks(0, 1)
    assert SENDING.gather({"loss": 1.5}) == [{"loss": 1.5}] * 2
    used, unused = (torch.nn.Parameter(torch.arange(6.0, device=group).view(2, 3)) for _ in range(2))
    used.grad = torch.full_like(used, 0.25)
    SENDING.sum_gradients([used, unused])
    assert used.grad.tolist() == [[0.25] * 3] * 2
    assert unused.grad is None
    SENDING.broadcast_weights([used])
    assert used.flatten().tolist() == list(range(6))


def test_a_sharded_optimiser_moves_weights_as_a_whole_one(group: str) -> None:
    config = TrainingConfig(parallel=ParallelConfig(processes=2, shard_optimiser=True))
    whole = torch.nn.Linear(4, 3, device=group)
    split = copy.deepcopy(whole)
    optimisers = [make_optimiser(whole.parameters(), config), make_optimiser(split.parameters(), config, SENDING)]
    for step in range(3):
        if step == 2:  # continues from its state
            state = whole_state(optimisers[1], SENDING)
            assert state is not None
            optimisers[1] = make_optimiser(split.parameters(), config, SENDING)
            restore(optimisers[1], copy.deepcopy(state))
        for model, optimiser in zip((whole, split), optimisers, strict=True):
            model(torch.ones(2, 4, device=group) * step).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
    assert torch.equal(whole.weight, split.weight)
    states = [whole_state(optimiser, ranks) for optimiser, ranks in zip(optimisers, (Ranks(), SENDING), strict=True)]
    assert all(state is not None for state in states)
    moments = [state["state"][0]["exp_avg"].cpu() for state in states if state is not None]
    assert torch.equal(*moments)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: two ranks cannot share one under NCCL")
def test_two_ranks_train_the_same_drafter_as_one(tmp_path: Path, plain_artifact: Path) -> None:
    answers = random_target.write_trajectories(tmp_path / "answers", random_target.trajectories(12, seed=5))
    inputs = {"target": plain_artifact, "trajectories": answers}
    drafter = {"num_layers": 1, "block_size": 5, "target_layer_ids": [2, 0]}
    named = {name: str(folder) for name, folder in inputs.items()}
    training = Training("sft", "draftsmith.stages.training.sft.stage", {"drafter": drafter}, named)
    alone = RecordingContext.under(tmp_path / "one", inputs)
    training.run(alone)
    folder, pair = tmp_path / "two", ParallelConfig(processes=2)
    launch(
        pair,
        run_all,
        ([training], str(folder), None, {"parallel": pair}),
        notes=folder / "ranks",
        stop=threading.Event(),
    )
    ours, expected = (
        load_file(out / DRAFTER_FOLDER / "model.safetensors") for out in (folder / "sft" / "out", alone.out)
    )
    for name, weights in expected.items():
        torch.testing.assert_close(ours[name], weights, rtol=0, atol=1e-4)
