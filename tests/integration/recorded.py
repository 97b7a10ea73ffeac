"""The plug-in's records: as a trace to compare with replay, and checked against the target in transformers.

The check uses only tokens of the server. The target's float32 logits after the prompt, the answer so far and the block
show which proposals greedy verification accepts, which token follows, and each proposal's log-prob.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.engines.sglang.protocol import KEY
from draftsmith.stages.replay.steps import Steps
from tests.testbed import target

TOLERANCE = 1e-4  # nats, float32
Answer = dict[str, Any]


class Reference:
    """The target in transformers, float32."""

    def __init__(self, model: Path):
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.prompts = target.fresh_prompt_ids(model, 24)

    @torch.no_grad()
    def _logits(self, tokens: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self._model(torch.tensor([tokens])).logits[0].float()
        return logits

    def check(self, prompt: list[int], answer: Answer, drafter: str) -> Counter[int]:
        """Check a whole trace, and return the accepted lengths of its steps."""
        output, meta = answer["output_ids"], answer["meta_info"]
        elements = meta[KEY]
        assert len(elements) == len(output)
        assert elements[0] == {"v": "1", "drafter": drafter}
        accepted: Counter[int] = Counter()
        at, prefills = 1, 0
        while at < len(output):
            step = elements[at]
            if step is None:  # a prefill made this token
                assert output[at] == self._logits(prompt + output[:at])[-1].argmax().item()
                at, prefills = at + 1, prefills + 1
                continue
            committed = self._check_step(prompt, output, at, step, drafter)
            assert elements[at + 1 : at + committed] == [None] * (min(at + committed, len(output)) - at - 1)
            accepted[step["accepted"]] += 1
            at += committed
        # A request that is retracted again before it ran has one prefill for both.
        assert prefills <= meta["num_retractions"]
        assert accepted.total() == meta.get("spec_verify_ct", 0)  # SGLang's own count; none for one token
        return accepted

    def _check_step(self, prompt: list[int], output: list[int], at: int, step: Answer, drafter: str) -> int:
        """Check one record, and return how many tokens it committed."""
        assert (step["v"], step["drafter"]) == ("1", drafter)
        assert step["anchor"] == len(prompt) + at - 1
        block, accepted = step["block"], step["accepted"]
        logits = self._logits(prompt + output[:at] + block)[step["anchor"] :]
        best = logits.argmax(-1).tolist()
        agreeing = next((j for j, token in enumerate(block) if token != best[j]), len(block))
        assert (accepted, step["bonus"]) == (agreeing, best[agreeing])
        committed = [*block[:accepted], step["bonus"]]
        assert output[at : at + len(committed)] == committed[: len(output) - at]  # the end of an answer cuts it
        exact = logits[:-1].log_softmax(-1).gather(1, torch.tensor(block)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(step["logprobs"]), exact, rtol=0, atol=TOLERANCE)
        return len(committed)


def body(prompt: list[int], *, trace: bool = True, **sampling: object) -> Answer:
    custom = {"custom_params": {KEY: True}} if trace else {}
    return {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 48, "ignore_eos": True, **custom, **sampling},
    }


def asked_for_nothing(answer: Answer) -> bool:
    """Return whether nothing was recorded. SGLang fills up with None if another request of the batch has a list."""
    return not any(answer["meta_info"].get(KEY) or [])


def trace_of(trajectory: Trajectory, elements: list[Any]) -> Steps:
    """Return the trace of the plug-in (one element an output token), cut at the end of the trajectory."""
    assert len(elements) == trajectory.answer_length
    steps = [element for element in elements if element and "anchor" in element]
    anchors = np.array([step["anchor"] for step in steps], dtype=np.int64)
    assert [at for at, element in enumerate(elements) if element in steps] == (
        anchors + 1 - trajectory.prompt_length
    ).tolist(), "a step's element is at the first token that it committed"
    proposed = np.array([step["block"] for step in steps], dtype=np.int64)
    accepted = np.array([step["accepted"] for step in steps], dtype=np.int64)
    length = len(trajectory.tokens)
    return Steps(length, anchors, np.minimum(accepted, length - 1 - anchors), proposed)


def assert_same_steps(trace: Steps, expected: Steps) -> None:
    np.testing.assert_array_equal(trace.anchors, expected.anchors)
    np.testing.assert_array_equal(trace.accepted, expected.accepted)
    np.testing.assert_array_equal(trace.proposed, expected.proposed)
