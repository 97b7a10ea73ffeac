"""A real vLLM server on the CPU that drafts with a target's native head: its verify steps are those of replay.

vLLM has no attention kernel for head sizes below 32, so the target has one attention head. Its native head is trained
for vLLM on the answers that are compared, or nothing would be accepted; which weights it then has does not matter.
"""

from __future__ import annotations

from pathlib import Path

import httpx

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.engines.servers.http import key_header
from draftsmith.stages.engines.vllm.records import completion_payload, drafting_metrics, read_steps
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.training.sft.stage import STAGE as SFT
from tests.stages.bench import step_rows, tau
from tests.testbed import random_target
from tests.testbed.context import RecordingContext
from tests.testbed.mtp import target_with_head
from tests.vllm_cpu.server import KEY, MARKS, PYTHON, running_server

pytestmark = MARKS


def test_every_step_is_that_of_replay(tmp_path: Path) -> None:
    assert isinstance(PYTHON, Path)
    target = target_with_head(tmp_path / "target", "mimo", num_attention_heads=1, num_key_value_heads=1)
    artifact = tmp_path / "target" / "out"
    prompts = [t.tokens[:4] for t in random_target.trajectories(24, seed=3)]
    requests = [Request(f"p{i}/0", prompt, 24) for i, prompt in enumerate(prompts)]
    plain = {
        c.request.request_id: c.trajectory() for c in EmbeddedEngine(target, slots=8, capacity=64).generate(requests)
    }
    answers = [plain[request.request_id] for request in requests]

    inputs = {"target": artifact, "trajectories": random_target.write_trajectories(tmp_path / "answers", answers)}
    training = {"sequences_per_step": 6, "anchors_per_sequence": 8, "compute_dtype": "float32", "learning_rate": 3e-3}
    shape = {"kind": "mtp", "block_size": 4, "engine": "vllm"}
    trained = RecordingContext.under(tmp_path / "sft", inputs).run(SFT, **training, drafter=shape, steps=120)
    head = trained.out / DRAFTER_FOLDER
    (trace,) = Replayer(target).traces({"it": load_drafter(head, target)}, answers).values()
    assert tau(trace) > 1.3

    with running_server(PYTHON, artifact, head, tmp_path) as url:  # its tokenizer knows no text: no handshake
        for request, answer, steps in zip(requests, answers, trace, strict=True):
            payload, headers = completion_payload(request, target.info.eos_ids), key_header(KEY)
            body = httpx.post(f"{url}/v1/completions", json=payload, headers=headers, timeout=300).json()
            tokens = answer.tokens[answer.prompt_length :]
            assert body["choices"][0]["token_ids"] == tokens
            metrics = drafting_metrics(body)
            assert metrics is not None
            served = read_steps(request, tokens, metrics)
            assert [row[:2] for row in step_rows(served)] == [row[:2] for row in step_rows(steps)]
    assert sum(len(steps.anchors) for steps in trace) > 100
