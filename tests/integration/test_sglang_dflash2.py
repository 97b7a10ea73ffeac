"""A stock SGLang server with a DFlash2 drafter whose layer has a window, float32: its proposals are those of replay.

Convolutions, selector and window are SGLang's own code there. The drafter is the trained DFlash one with what it lacks
at random, so that every part changes proposals and some are still kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import PreparedDrafter
from draftsmith.stages.drafters.checkpoint import load_drafter, save_drafter, upgrade_drafter
from draftsmith.stages.drafters.dflash2.config import DFlash2Config
from draftsmith.stages.drafters.dflash2.model import DFlash2Drafter
from draftsmith.stages.engines.sglang.protocol import KEY
from draftsmith.stages.replay.chains import replay_chains
from draftsmith.stages.replay.trace import Trace, tau
from tests.integration.recorded import Served, assert_same_steps, trace_of
from tests.sglang_cpu.fixtures import ServingTarget
from tests.sglang_cpu.server import generate, running_server
from tests.stages.bench import GREEDY_TOKENS, Bench

pytestmark = [pytest.mark.sglang, pytest.mark.integration]

PROMPTS, WINDOW = 24, 20
SHAPE = DFlash2Config(kind="dflash2", conv_group_size=16, selector_rank=16, selector_top_k=8)


def write_checkpoint(trained: Path, bench: Bench, folder: Path) -> None:
    made = upgrade_drafter(load_drafter(trained, bench.target), SHAPE, bench.target, seed=0)
    assert isinstance(made, DFlash2Drafter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "_conv." in name or "codebook" in name:
                scale = 0.03 if "_conv." in name else 0.5
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    layers = ["sliding_attention"] * made.config.num_hidden_layers
    made.config.update({"layer_types": layers, "sliding_window": WINDOW, "use_sliding_window": True})
    save_drafter(made, folder, torch.float32)


@dataclass(frozen=True)
class Traced:
    """The server's answers, and replay's results for the same prompts."""

    served: Served
    bench: Bench

    @property
    def trajectories(self) -> list[Trajectory]:
        """The embedded engine's plain greedy answers."""
        return self.bench.answered(PROMPTS)

    def replayed(self, drafter: DFlash2Drafter) -> list[Trace]:
        head = drafter.drafting_head(self.bench.target.head_weight, None)
        _, context = self.bench.read(self.trajectories, drafter)
        return replay_chains(PreparedDrafter(drafter, head, drafter.block_size), context, self.trajectories)

    @property
    def drafter(self) -> DFlash2Drafter:
        drafter = self.bench.drafters["dflash2"]
        assert isinstance(drafter, DFlash2Drafter)
        return drafter


@pytest.fixture(scope="module")
def traced(
    sglang_env: Path,
    serving_target: ServingTarget,
    bench: Bench,
    sglang_logs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Traced]:
    checkpoint = tmp_path_factory.mktemp("dflash2")
    write_checkpoint(serving_target.drafter, bench, checkpoint)
    bench = bench.with_drafters({"dflash2": load_drafter(checkpoint, bench.target)})
    sampling = {"temperature": 0.0, "max_new_tokens": GREEDY_TOKENS, "custom_params": {KEY: True}}
    requests = [{"input_ids": p.token_ids, "sampling_params": sampling} for p in bench.prompts[:PROMPTS]]
    with running_server(sglang_env, serving_target.model, checkpoint, log=sglang_logs / "dflash2.log") as url:
        yield Traced(Served(generate(url, requests, concurrency=6)), bench)


def test_answers_are_the_plain_greedy_ones_and_the_trace_is_that_of_replay(traced: Traced) -> None:
    assert traced.served.answers == [t.tokens[t.prompt_length :] for t in traced.trajectories]
    replayed = traced.replayed(traced.drafter)
    for trajectory, elements, trace in zip(traced.trajectories, traced.served.meta(KEY), replayed, strict=True):
        assert_same_steps(trace_of(trajectory, elements), trace)
    assert tau(replayed) > 1.3, "proposals are kept, too"


def test_every_part_of_the_drafter_shows_in_what_was_served(traced: Traced) -> None:
    """Without it, replay would propose something else."""
    served = [trace_of(t, e).proposed for t, e in zip(traced.trajectories, traced.served.meta(KEY), strict=True)]

    def differs(drafter: DFlash2Drafter) -> bool:
        replayed = [trace.proposed for trace in traced.replayed(drafter)]
        return any(a.shape != b.shape or not np.array_equal(a, b) for a, b in zip(served, replayed, strict=True))

    assert not differs(traced.drafter)
    for part in ("window", "convolutions", "selector"):
        other = copy.deepcopy(traced.drafter)
        with torch.no_grad():
            if part == "window":
                other.spans = [type(sight)(None, sight.causal) for sight in other.spans]
            elif part == "selector":
                other.candidate_selector.successor_codebook.zero_()
            else:
                for layer in other.layers:
                    layer.attention_conv.initialise()  # type: ignore[union-attr,operator]
                    layer.mlp_conv.initialise()  # type: ignore[union-attr,operator]
        assert differs(other), part
