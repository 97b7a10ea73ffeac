"""A stock SGLang server with the trained tiny drafter, float32: the answers are plain greedy ones, the traces replay's.

Replay, the embedded engine, transformers and SGLang are four programs that never see each other's code here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftsmith.stages.diagnosis import RESULT, STAGE, DiagnosisConfig
from draftsmith.stages.engines.base import Completion
from draftsmith.stages.engines.sglang.protocol import KEY
from draftsmith.stages.replay.chains import replay_chains
from draftsmith.stages.replay.trace import Trace, Trajectory
from tests.sglang_cpu.fixtures import ServingTarget
from tests.sglang_cpu.server import generate
from tests.stages.bench import GREEDY_TOKENS, Bench
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts

pytestmark = [pytest.mark.sglang, pytest.mark.integration]

PROMPTS = 32


@dataclass(frozen=True)
class Served:
    """The answers of one server to the first prompts of the bench, in their order."""

    bodies: list[dict[str, Any]]

    @property
    def answers(self) -> list[list[int]]:
        return [body["output_ids"] for body in self.bodies]

    def meta(self, name: str) -> list[Any]:
        return [body["meta_info"].get(name) for body in self.bodies]


def ask(url: str, bench: Bench, **sampling: object) -> Served:
    """Greedy, several in flight, so that the batches of the server change from step to step."""
    params = {"temperature": 0.0, "max_new_tokens": GREEDY_TOKENS, **sampling}
    requests = [{"input_ids": p.token_ids, "sampling_params": params} for p in bench.prompts[:PROMPTS]]
    return Served(generate(url, requests, concurrency=6))


@pytest.fixture(scope="module")
def traced(dflash_url: str, bench: Bench) -> Served:
    return ask(dflash_url, bench, custom_params={KEY: True})


@pytest.fixture(scope="module")
def embedded(bench: Bench) -> list[Completion]:
    """The embedded engine with the drafter in the loop."""
    requests = bench.requests(PROMPTS)
    answers = bench.answers(requests, "trained")
    return [answers[request.request_id] for request in requests]


@pytest.fixture(scope="module")
def replayed(bench: Bench) -> list[Trace]:
    """Of the embedded engine's plain answers, one block after the other."""
    return bench.sequential_traces(bench.answered(PROMPTS), "trained")


def trace_of(trajectory: Trajectory, elements: list[Any]) -> Trace:
    """The trace that the plug-in returned, one element an output token, cut where the trajectory ends."""
    assert len(elements) == trajectory.response_length
    steps = [element for element in elements if element and "anchor" in element]
    anchors = np.array([step["anchor"] for step in steps], dtype=np.int64)
    assert [at for at, element in enumerate(elements) if element in steps] == (
        anchors + 1 - trajectory.prompt_length
    ).tolist(), "a step's element is at the first token that it committed"
    proposed = np.array([step["block"] for step in steps], dtype=np.int64)
    accepted = np.array([step["accepted"] for step in steps], dtype=np.int64)
    length = len(trajectory.tokens)
    return Trace(length, anchors, np.minimum(accepted, length - 1 - anchors), proposed, 0)


def assert_same_steps(trace: Trace, expected: Trace) -> None:
    np.testing.assert_array_equal(trace.anchors, expected.anchors)
    np.testing.assert_array_equal(trace.accepted, expected.accepted)
    np.testing.assert_array_equal(trace.proposed, expected.proposed)


def test_the_plugins_trace_equals_replay_and_the_embedded_engines(
    traced: Served, replayed: list[Trace], embedded: list[Completion], bench: Bench
) -> None:
    known = bench.answered(PROMPTS)
    drafter = bench.drafters["trained"]
    _, context = bench.read(known, drafter)
    head = drafter.drafting_head(bench.target.head_weight, None)
    chained = replay_chains(drafter, context, known, drafter.block_size, head, 4)
    steps = 0
    for trajectory, elements, sequential, chain, completion in zip(
        known, traced.meta(KEY), replayed, chained, embedded, strict=True
    ):
        trace = trace_of(trajectory, elements)
        assert_same_steps(trace, sequential)
        assert_same_steps(trace, chain)
        assert [step.anchor for step in completion.steps] == trace.anchors.tolist()
        assert [step.accepted for step in completion.steps] == trace.accepted.tolist()
        assert [step.proposed for step in completion.steps] == trace.proposed.tolist()
        steps += len(trace.anchors)
    assert steps > 5 * PROMPTS


def test_the_standin_is_not_imported_where_there_is_a_gpu(sglang_env: Path) -> None:
    import subprocess

    script = "import torch; torch.cuda.is_available = lambda: True; import sgl_kernel"
    done = subprocess.run([str(sglang_env), "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "uninstall draftsmith-sglang-cpu" in done.stderr


def test_the_diagnosis_of_a_server(
    dflash_url: str, serving_target: ServingTarget, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    """Nothing is wrong with it as the server of its drafter; as that of another checkpoint it says so itself."""
    other = tmp_path / "other"
    shutil.copytree(serving_target.drafter, other)
    config = json.loads((other / "config.json").read_text())
    config["dflash_config"]["mask_token_id"] = 0
    (other / "config.json").write_text(json.dumps(config))
    found = {}
    for folder in (serving_target.drafter, other):
        inputs = {"target": tiny_drafter.target, "prompts": tiny_drafter.prompts}
        ctx = RecordingContext.under(tmp_path / f"of-{folder.name}", inputs)
        asked = {"prompts": 6, "sampling": {"max_new_tokens": 32}, "max_parity_mismatch": 0.02}
        STAGE.run(ctx, DiagnosisConfig.model_validate({"url": dflash_url, "drafter": str(folder), **asked}))
        found[folder] = json.loads((ctx.out / RESULT).read_text())
    assert found[serving_target.drafter]["agrees"], found
    assert found[serving_target.drafter]["as_it_is"]["mismatch"] <= 0.02
    assert not found[other]["agrees"] and found[other]["causes"] == [{"cause": "told by the server"}]
    assert str(other) in found[other]["sentence"]
