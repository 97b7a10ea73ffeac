"""DSpark checkpoints that were written here: in SGLang's own class, and served by a stock server with greedy requests.

Sampled ones are not: SGLang verifies them with a Triton kernel that a CPU does not run (`chain_speculative_sampling`).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.stages.data.trajectories import pad_tokens
from draftsmith.stages.drafters.checkpoint import save_drafter
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.sglang.server import write_step_costs
from draftsmith.stages.targets.causal_lm import Target
from tests.integration.recorded import Reference
from tests.integration.swapping import assert_drafts_with, assert_swaps, dspark
from tests.sglang_cpu import dspark_model
from tests.sglang_cpu.fixtures import ServingTarget
from tests.sglang_cpu.options import CPU_ENVIRONMENT
from tests.sglang_cpu.server import running_server
from tests.stages.bench import Bench, tau
from tests.testbed import random_target
from tests.testbed.dspark import random_dspark

pytestmark = [pytest.mark.sglang, pytest.mark.integration]

TOLERANCE = 3e-5  # float32, on values of order one to ten
PROMPTS = 12


FORMS = ("new", "upgraded")


def test_sglang_computes_what_is_computed_here(sglang_env: Path, plain_target: Target, tmp_path: Path) -> None:
    """New drafters and upgraded ones, in one process of SGLang's."""
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for form in FORMS:
        new = form == "new"
        drafter = random_dspark(plain_target, from_anchor=new, confidence_reads_token=new)
        folder = tmp_path / form
        save_drafter(drafter, folder / "drafter", torch.float32)
        texts = random_target.trajectories(3, seed=4)
        tokens = pad_tokens(texts, plain_target.device)
        features = plain_target.read(tokens, drafter.target_layer_ids).features
        assert features is not None
        anchors = torch.tensor([[4, 7, 9]] * 3)
        case = {"tokens": tokens, "features": features, "anchors": anchors}
        shared = {"embedding": plain_target.embedding, "head": plain_target.head_weight}
        save_file(case | {name: tensor.detach().clone() for name, tensor in shared.items()}, folder / "case")

        head, at = drafter.head_over(plain_target.head_weight, None), tokens.gather(1, anchors)
        with torch.no_grad():
            context = drafter.encode(features, tokens, torch.arange(tokens.shape[1]).expand(3, -1))
            block = drafter.propose(context, at, anchors, drafter.block_size, head)
            given = torch.cat([at[..., None], block[..., :-1]], -1)
            hidden = drafter.block_hidden(context, given, anchors)
            expected[form] = {
                "hidden": hidden[..., : head.weight.shape[1]],
                "logits": head.logits(hidden),
                "confidence": drafter.confidence(hidden),
                "proposals": block,
            }

    command = [str(sglang_env), "-I", str(dspark_model.__file__), *(str(tmp_path / each) for each in FORMS)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | CPU_ENVIRONMENT
    environment["SGLANG_RAGGED_VERIFY_MODE"] = "compact"
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for form, values in expected.items():
        derived = load_file(tmp_path / form / "swap")
        numbers = range(len(derived) // 2)
        assert len(numbers) >= 4 and all(torch.equal(derived[f"held {i}"], derived[f"anew {i}"]) for i in numbers)
        served = load_file(tmp_path / form / "out")
        assert torch.equal(served["proposals"], values.pop("proposals"))
        for name, value in values.items():
            message = f"{form}: {name}"
            torch.testing.assert_close(served[name], value, atol=TOLERANCE, rtol=TOLERANCE, msg=message)


def test_step_times_are_read_and_choose_how_much_is_verified(sglang_env: Path, tmp_path: Path) -> None:
    """By SGLang's own loader and planner: the times of the table, between which it interpolates over tokens."""
    drafting, verifying = {"1": 0.001, "8": 0.002}, {"1": 0.003, "8": 0.003, "64": 0.059}
    *_, path = write_step_costs(tmp_path, drafting, verifying)
    program = """
import sys, torch
from sglang.srt.speculative.dspark_components.dspark_planner import (
    DSparkScheduleConfig, compute_verify_token_budget, load_sps_table_from_path)
table = load_sps_table_from_path(sys.argv[1])
print(*(f"{table.step_time(num_reqs=n, budget=b):.4f}" for n, b in ((1, 0), (1, 7), (8, 0), (8, 56), (8, 28))))
kept = 0.5 ** torch.arange(1, 8).float()
for requests in (1, 8):
    plan = compute_verify_token_budget(
        history_survival_probs=kept.expand(requests, 7), sps_table=table, cfg=DSparkScheduleConfig(gamma=7))
    print(plan.budget)
"""
    read = subprocess.run([sglang_env, "-c", program, path], check=True, capture_output=True, text=True)
    times, alone, together = read.stdout.splitlines()[-3:]
    assert times == "0.0040 0.0040 0.0050 0.0610 0.0330"
    assert (alone, together) == ("7", "0"), "one more proposal is free alone; of 8 requests it costs more than it gains"


def test_a_server_records_the_steps_of_replay(
    sglang_env: Path, serving_target: ServingTarget, bench: Bench, sglang_logs: Path, tmp_path: Path
) -> None:
    drafter = dspark(bench)
    bench = bench.with_drafters({"before": bench.drafters["trained"], "trained": drafter})  # prompts without a near-tie
    save_drafter(drafter, tmp_path / "drafter", torch.float32)
    log, block = sglang_logs / "dspark.log", drafter.block_size
    options = {"speculative-dspark-block-size": block - 1, "speculative-num-draft-tokens": block}
    with running_server(sglang_env, serving_target.model, tmp_path / "drafter", "DSPARK", options, log=log) as url:
        answers, served = assert_drafts_with(url, bench, "trained", PROMPTS)
        assert_swaps(url, bench, tmp_path / "drafter", "DSPARK", tmp_path / "other")
    reference, digest = Reference(serving_target.model), drafter_digest(tmp_path / "drafter")
    for prompt, answer in zip(bench.prompts, answers, strict=False):
        reference.check(prompt.token_ids, answer, digest)
    before = bench.replay(bench.answered(PROMPTS), "before", None)
    assert [len(steps.anchors) for steps in served] != [len(trace.anchors) for trace in before]
    assert tau(served) > 2
