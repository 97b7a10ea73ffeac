"""A stock SGLang server with an EAGLE-3 drafter that was trained and exported here, as a chain, float32.

The answers are plain greedy ones, and the plug-in's trace is the one that replay finds: SGLang's own program of the
drafter computes what the model here computes, on the target's text and on its own proposals.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.sglang.server import write_schedule
from tests.integration.recorded import Reference, asked_for_nothing, body
from tests.integration.swapping import assert_drafts_with, assert_swaps
from tests.sglang_cpu.fixtures import ServingTarget
from tests.sglang_cpu.server import generate, running_server
from tests.stages.bench import Bench, tau

pytestmark = [pytest.mark.sglang, pytest.mark.integration]

PROMPTS = 32


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


def test_answers_are_the_plain_greedy_ones_and_the_trace_is_that_of_replay(
    url: str, bench: Bench, tiny_eagle3: Path
) -> None:
    bench = bench.with_drafters({"trained": load_drafter(tiny_eagle3 / DRAFTER_FOLDER, bench.target)})
    _, replayed = assert_drafts_with(url, bench, "trained", PROMPTS)
    assert tau(replayed) > 2.5, "the drafter is a trained one"
    kept = np.concatenate([trace.accepted for trace in replayed])
    assert set(kept.tolist()) == {0, 1, 2, 3, 4}, "nothing, parts and whole chains are kept"


def test_every_step_of_a_chain_is_right_where_some_requests_of_a_batch_ask_for_it(
    url: str, serving_target: ServingTarget, tiny_eagle3: Path
) -> None:
    reference, digest = Reference(serving_target.model), drafter_digest(tiny_eagle3 / DRAFTER_FOLDER)
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


def test_blocks_by_load_are_read_and_stay_whatever_is_accepted(sglang_env: Path, tmp_path: Path) -> None:
    *_, path = write_schedule(tmp_path, [[1, 3, 4], [4, 7, 2], [8, 16, 0]])
    program = """
import sys
from sglang.srt.speculative.adaptive_spec_params import AdaptiveSpeculativeParams
read = AdaptiveSpeculativeParams(initial_steps=4, cfg_path=sys.argv[1])
for accepted in [4] * 40 + [0] * 40:
    assert [read.on_verify_complete([accepted] * n, n) for n in (1, 4, 8)] == [None] * 3
print(*(read.get_steps_for_batch(n) for n in range(1, 20)))
"""
    read = subprocess.run([sglang_env, "-c", program, path], check=True, capture_output=True, text=True)
    steps = [4] * 3 + [2] * 4 + [0] * 12
    assert read.stdout.splitlines()[-1] == " ".join(map(str, steps))


def test_its_weights_are_swapped(url: str, bench: Bench, tiny_eagle3: Path, tmp_path: Path) -> None:
    assert_swaps(url, bench, tiny_eagle3 / DRAFTER_FOLDER, "EAGLE3", tmp_path / "other")
