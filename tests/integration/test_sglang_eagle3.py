"""A stock SGLang server with an EAGLE-3 drafter that was trained and exported here, as a chain, float32.

The answers are plain greedy ones, and the plug-in's trace is the one that replay finds: SGLang's own program of the
drafter computes what the model here computes, on the target's text and on its own proposals.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, Trajectory
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.sglang.protocol import KEY
from draftsmith.stages.replay.trace import Trace, tau
from tests.integration.recorded import Reference, Served, asked_for_nothing, assert_same_steps, body, trace_of
from tests.integration.swapping import assert_swaps
from tests.sglang_cpu.fixtures import ServingTarget
from tests.sglang_cpu.server import generate, running_server
from tests.stages.bench import GREEDY_TOKENS, Bench

pytestmark = [pytest.mark.sglang, pytest.mark.integration]

PROMPTS = 32


@dataclass(frozen=True)
class Traced:
    """The server's answers, and replay's results for the same prompts."""

    served: Served
    bench: Bench
    checkpoint: Path

    @property
    def trajectories(self) -> list[Trajectory]:
        """The embedded engine's plain greedy answers."""
        return self.bench.answered(PROMPTS)

    def replayed(self, chains: int | None) -> list[Trace]:
        return self.bench.replay(self.trajectories, "trained", chains)


@pytest.fixture(scope="module")
def url(sglang_env: Path, serving_target: ServingTarget, tiny_eagle3: Path, sglang_logs: Path) -> Iterator[str]:
    checkpoint, log = tiny_eagle3 / DRAFTER_FOLDER, sglang_logs / "eagle3.log"
    block_size = json.loads((checkpoint / "config.json").read_text())["block_size"]
    options = {
        "speculative-num-steps": block_size - 1,
        "speculative-eagle-topk": 1,
        "speculative-num-draft-tokens": block_size,
    }
    with running_server(sglang_env, serving_target.model, checkpoint, "EAGLE3", options, log=log) as url:
        yield url


@pytest.fixture(scope="module")
def traced(url: str, bench: Bench, tiny_eagle3: Path) -> Traced:
    """Several requests in flight, so that the batches of the server change from step to step."""
    checkpoint = tiny_eagle3 / DRAFTER_FOLDER
    bench = bench.with_drafters({"trained": load_drafter(checkpoint, bench.target)})
    sampling = {"temperature": 0.0, "max_new_tokens": GREEDY_TOKENS, "custom_params": {KEY: True}}
    requests = [{"input_ids": p.token_ids, "sampling_params": sampling} for p in bench.prompts[:PROMPTS]]
    return Traced(Served(generate(url, requests, concurrency=6)), bench, checkpoint)


@pytest.mark.parametrize("chains", [1, None])
def test_answers_are_the_plain_greedy_ones_and_the_trace_is_that_of_replay(chains: int | None, traced: Traced) -> None:
    assert traced.served.answers == [t.tokens[t.prompt_length :] for t in traced.trajectories]
    replayed = traced.replayed(chains)
    assert traced.served.meta("spec_verify_ct") == [len(trace.anchors) for trace in replayed]
    for trajectory, elements, trace in zip(traced.trajectories, traced.served.meta(KEY), replayed, strict=True):
        assert_same_steps(trace_of(trajectory, elements), trace)
    assert tau(replayed) > 2.5, "the drafter is a trained one"
    kept = np.concatenate([trace.accepted for trace in replayed])
    assert set(kept.tolist()) == {0, 1, 2, 3, 4}, "nothing, parts and whole chains are kept"


def test_every_step_of_a_chain_is_right_where_some_requests_of_a_batch_ask_for_it(
    url: str, traced: Traced, serving_target: ServingTarget
) -> None:
    reference, digest = Reference(serving_target.model), drafter_digest(traced.checkpoint)
    requests = [body(prompt, trace=i % 4 != 0) for i, prompt in enumerate(reference.prompts)]
    accepted: Counter[int] = Counter()
    for number, (prompt, answer) in enumerate(
        zip(reference.prompts, generate(url, requests, concurrency=8), strict=True)
    ):
        if number % 4 == 0:
            assert asked_for_nothing(answer)
        else:
            accepted += reference.check(prompt, answer, digest)
    assert {0, 4} <= accepted.keys()  # nothing and whole chains were kept


def test_its_weights_are_swapped(url: str, bench: Bench, tiny_eagle3: Path, tmp_path: Path) -> None:
    assert_swaps(url, bench, tiny_eagle3 / DRAFTER_FOLDER, "EAGLE3", tmp_path / "other")
