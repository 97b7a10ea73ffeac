"""What ranks send each other, in a group of one process: NCCL on a GPU, gloo on the CPU."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator

import pytest
import torch
from torch import distributed as dist

from draftsmith.stages.runtime.ranks import Ranks, process_group
from draftsmith.stages.runtime.stage import ParallelConfig
from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.loop import make_optimiser, restore, whole_state

# Sends as one of two ranks, and receives from itself alone: sums have one term.
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
    config = TrainingConfig(parallel=ParallelConfig(processes=2, shard_optimiser=True), weight_decay=0.01)
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
