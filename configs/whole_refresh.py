"""A whole refresh in one file: a target and prompts become two drafters, compared on held-out prompts.

    python configs/whole_refresh.py Qwen/Qwen3-0.6B prompts.jsonl    # rows {"messages": [{"role": …, "content": …}]}

`draftsmith run` calls the same classes. It adds the cache, checkpoints, servers, several GPUs, timed runs, the gate and
the report. Only the names of `draftsmith` itself are public: the modules inside change without notice.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

import draftsmith
from draftsmith.stages.data.chat_template import token_ids
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import create_drafter
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY
from draftsmith.stages.training.config import OpdConfig, SftConfig
from draftsmith.stages.training.opd.body import MinedData, OpdTraining
from draftsmith.stages.training.opd.verify_steps import MinedTable
from draftsmith.stages.training.optimiser import CLIP_NORM, cosine
from draftsmith.stages.training.sft.body import SftTraining
from draftsmith.stages.training.trainer import Trainer, TrainingData

NEW_TOKENS = 128  # of the longest answer
SHAPE = DFlashConfig(num_layers=2, block_size=8)  # a block is an anchor and 7 proposals
SFT = SftConfig(steps=1000, compute_dtype="float32")
OPD = OpdConfig(steps=100, compute_dtype="float32", anchors="errors")  # trains the blocks that verification rejects


def refresh(source: str, prompts: Sequence[list[dict[str, str]]], held_out: int) -> draftsmith.Comparison:
    """Train drafters for a target on all prompts except the last `held_out`, and compare them on these."""
    target = draftsmith.load_target(source, dtype="float32")
    prompt_ids = [token_ids(target.tokenizer, messages, "prompts", {}) for messages in prompts]

    # 1. Rollout: the target answers every prompt.
    answers = rollout(target, prompt_ids)
    train_answers, held_out_answers = answers[:-held_out], answers[-held_out:]

    # 2. SFT: a new drafter learns to continue these answers.
    data = TrainingData(trajectories=train_answers)
    drafters = {"untrained": create_drafter(SHAPE, target, seed=0)}
    drafters["SFT"] = copy.deepcopy(drafters["untrained"])
    train("SFT", SftTraining(drafters["SFT"], target, data, SFT))

    # 3. Replay: where does the target reject what the drafter proposes?
    mined = mine(target, drafters["SFT"], train_answers)

    # 4. OPD: the drafter goes on from there. The control, SFT for as many steps, shows what more training alone gives.
    drafters["SFT + OPD"], drafters["SFT continued"] = copy.deepcopy(drafters["SFT"]), copy.deepcopy(drafters["SFT"])
    mined_data = MinedData(trajectories=train_answers, mined=mined)
    train("OPD", OpdTraining(drafters["SFT + OPD"], target, mined_data, OPD, seed=1))
    train("control", SftTraining(drafters["SFT continued"], target, data, SFT.continued(OPD), seed=1))

    # 5. Comparison: acceptance on held-out answers. Drafting must not change a token of them.
    drafted = rollout(target, prompt_ids[-held_out:], drafters["SFT + OPD"])
    equal = sum(ours.tokens == plain.tokens for ours, plain in zip(drafted, held_out_answers, strict=True))
    print(f"{equal} of {held_out} answers with the drafter equal the target's own")
    names = [answer.trajectory_id for answer in held_out_answers]
    return draftsmith.compare(target, drafters, draftsmith.Answers(held_out_answers, names, GREEDY))


def rollout(target: Target, prompt_ids: Sequence[list[int]], drafter: Drafter | None = None) -> list[Trajectory]:
    """Return the target's greedy answers, in the order of the prompts. drafter: makes decoding faster."""
    requests = [Request(f"{index}/0", ids, NEW_TOKENS) for index, ids in enumerate(prompt_ids)]
    engine = EmbeddedEngine(target, drafter, capacity=max(map(len, prompt_ids)) + NEW_TOKENS + SHAPE.block_size)
    answers = {completion.request.request_id: completion.trajectory() for completion in engine.generate(requests)}
    return [answers[request.request_id] for request in requests]


def train(name: str, training: Trainer) -> None:
    """Take all optimiser steps of a training."""
    weights, config = list(training.drafter.parameters()), training.config
    optimiser = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(cosine, config=config))
    for step in range(config.steps):
        (report,) = training.micro_batches(step, None)  # None: the whole step is one micro-batch
        report.loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP_NORM)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        print(f"{name} step {step}: loss {report.loss.item():.4f}")


def mine(target: Target, drafter: Drafter, answers: Sequence[Trajectory]) -> MinedTable:
    """Rebuild the verify steps of the drafter on stored answers, without generating any text."""
    groups = Replayer(target).mine(drafter, answers)  # the target reads the answers of a group together
    steps_of = {answer.trajectory_id: steps for group in groups for answer, steps in group}
    traces = [steps_of[answer.trajectory_id] for answer in answers]
    rejected = np.array([np.count_nonzero(steps.rejected_offset) for steps in traces])
    visited = np.array([len(steps) for steps in traces])
    print(f"verification rejects something in {rejected.sum()} of {visited.sum()} verify steps")
    return MinedTable(traces.__getitem__, visited, rejected, proposals=drafter.block_size - 1)


if __name__ == "__main__":
    rows = Path(sys.argv[2]).read_text("utf-8").splitlines()
    print(refresh(sys.argv[1], [json.loads(row)["messages"] for row in rows], held_out=len(rows) // 5))
