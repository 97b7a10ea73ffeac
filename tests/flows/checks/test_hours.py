"""The time of a run: by its last run, or by FLOP, which are compared with torch's counts of small real steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from draftsmith.artifacts.host import GPU_MODELS, GpuModel
from draftsmith.artifacts.store.manifest import Manifest
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.checks.hours import check_hours, node_flop, step_flop
from draftsmith.flows.checks.memory import stage_uses
from draftsmith.flows.planning.graph import Node
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.stages.drafters import block_attention
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.estimate import AnswerCounts, StageUse
from draftsmith.stages.training.config import OpdConfig
from draftsmith.stages.training.lora import Adapter
from draftsmith.stages.training.opd.anchor_sources import TableAnchors
from draftsmith.stages.training.opd.body import MinedData, OpdTraining
from draftsmith.stages.training.optimiser import Accumulation
from draftsmith.stages.training.trainer import loaded_sizes
from tests.benchmarks.sft_step import invented_steps
from tests.flows.checks.test_memory import qwen_sizes
from tests.gpu.trainings import Training, make_training
from tests.gpu.world import Scale, make_drafter, make_target, make_trajectories
from tests.stages.kernel_flops import KERNEL_FLOPS
from tests.stages.training.case import mined_table
from tests.testbed.refresh import node_of, small_refresh

SMALL = Scale(
    "small",
    {
        "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    },
    DFlashConfig(num_layers=3, block_size=8, target_layer_ids=(4, 2, 0), mask_token=1023),
    {"sequences_per_step": 3, "anchors_per_sequence": 8, "feature_memory_mb": 1e-3},  # the target reads every batch
    prompt=8,
    longest=72,
    answers=3,
)  # fmt: skip
PAPER = {"loss": "paper", "anchors": "errors", "remine_every": 1}
TWO_OFFSETS = {"loss": {"preset": "paper", "rejected": {"offsets": 2}}}
WITHIN = 0.1


def counted(training: Training, target: Target) -> float:
    """Run a step without its optimiser, and return torch's count."""
    accumulation = Accumulation()
    with (
        FlopCounterMode(display=False, custom_mapping=KERNEL_FLOPS) as flops,
        torch.autocast(target.device.type, torch.bfloat16),
    ):
        for report in training.micro_batches(1, None):
            with torch.autocast(target.device.type, enabled=False):
                accumulation.add(report)
    return flops.get_total_flops()


def mined_steps(training: OpdTraining) -> float:
    """Return the verify steps of all answers under the drafter's weights, as the step has mined them."""
    assert isinstance(training.memory, TableAnchors)
    return float(sum(len(training.memory.steps(i).anchors) for i in range(SMALL.answers)))


@pytest.mark.parametrize(
    "kind", ["SFT", "SFT of an adapter", "OPD", "OPD, chains", "OPD, mined again", "OPD, two offsets"]
)
def test_a_step_takes_what_torch_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target(SMALL, "cpu", "bfloat16")
    drafter, answers = make_drafter(SMALL.drafter, target), make_trajectories(SMALL)
    mines, adapted = kind in ("OPD, mined again", "OPD, two offsets"), kind == "SFT of an adapter"
    if mines:
        rng, K = np.random.default_rng(0), drafter.block_size - 1
        table = mined_table([invented_steps(t, K, 1.0, rng) for t in answers], K)  # a step a token, as random weights
        mined = MinedData(trajectories=answers, mined=table)
        fields = {**SMALL.step, **PAPER, **(TWO_OFFSETS if kind == "OPD, two offsets" else {})}
        training: Training = OpdTraining(drafter, target, mined, OpdConfig.model_validate(fields))
    else:
        fields = {**SMALL.step, **({"lora": {"rank": 8}} if adapted else {})}
        if kind == "OPD, chains":
            fields["anchors"] = "chains"
        training = make_training(kind[:3], drafter, target, answers, fields)
    if training.config.lora is not None:
        Adapter(drafter, training.config.lora, "bfloat16", 0)
    monkeypatch.setattr(block_attention, "_MASK_ENTRIES", 1)  # no block is read beyond its anchor
    operations = counted(training, target)
    steps = mined_steps(training) if isinstance(training, OpdTraining) and mines else 0.0
    sizes = replace(loaded_sizes(target, drafter, SMALL.longest), longest_prompt=SMALL.prompt)
    use = StageUse(sizes, answers=AnswerCounts(SMALL.longest, SMALL.answers, steps))
    assert sum(step_flop(training.config, use).values()) == pytest.approx(operations, rel=WITHIN)


def test_an_answer_is_read_once_where_its_keys_are_kept() -> None:
    sizes = qwen_sizes()
    use = StageUse(sizes, answers=AnswerCounts(4608, 16000))
    fields = {"loss": "paper", "anchors": "errors", "sequences_per_step": 3, "anchors_per_sequence": 512}
    once, twice = (
        step_flop(OpdConfig.model_validate({**fields, "feature_memory_mb": memory}), use)
        for memory in (2048, 1900)  # keys and values of 3 · 4,608 tokens take 1,944 MB
    )
    assert once["target"] == twice["target"]
    assert twice["scoring"] - once["scoring"] == pytest.approx(once["target"])


@pytest.mark.parametrize(
    ("limits", "known"), [({}, False), ({"rows": 2000}, False), ({"rows": 2000, "max_tokens": 1024}, True)]
)
def test_mining_of_logs_without_limits_takes_an_unknown_time(limits: dict[str, int], known: bool) -> None:
    """The target's whole context is no length of an answer."""
    logs = node_of("logs", paths=["a.jsonl"], temperature=0, **limits)
    mining = node_of("mining", {"trajectories": "logs"})
    assert (node_flop(mining, stage_uses([logs, mining], qwen_sizes())["mining"]) > 0) == known


def made(node: str, took: float, run: str = "r", **metrics: float) -> Manifest:
    """Return what a run made at a node, and how many seconds that took."""
    return Manifest(
        schema_version=1, stage="sft", key="1" * 64, content_id="c" * 64, created_at="", config={}, inputs={},
        external={}, code_digest="", modules={}, seed=0, files={}, metrics=metrics, mlflow_run_id=None,
        duration_s=took, versions={}, run=run, node=node,
    )  # fmt: skip


def time(nodes: list[Node], history: list[Manifest], gpu: GpuModel | None = None, **stages: int) -> str:
    """Return the line of a run named `r` that makes these nodes."""
    (text,) = lines_of(nodes, history, gpu, stages=stages).values()
    return text


def lines_of(
    nodes: list[Node], history: list[Manifest], gpu: GpuModel | None = None, **fields: object
) -> dict[str, str]:
    """Return the lines of a run named `r` by their check."""
    config = RefreshConfig.model_validate(small_refresh("r", "target", "prompts.jsonl", 32, **fields))
    findings = Findings()
    check_hours(findings, nodes, stage_uses(nodes, qwen_sizes()), config, history, gpu)
    assert findings.lines[0].check == "time"
    return {line.check: line.text for line in findings.lines}


ROLLOUT = node_of("rollout")
SFT = node_of("sft", {"trajectories": "rollout"}, steps=10)


def test_a_run_takes_as_long_as_the_last_one_of_its_name() -> None:
    history = [made("sft", 7), made("rollout", 60), made("sft", 100), made("sft", 9, "other")]
    nodes = [ROLLOUT, SFT, node_of("prompts", sources=[{"kind": "jsonl", "path": "p"}], train=1, heldout=1)]
    assert time(nodes, []) == "known after a first run: rollout, sft"
    assert time(nodes, history, GPU_MODELS["H100"]) == (
        "about 2 min 40 s; as in the last run: rollout 1 min 00 s, sft 1 min 40 s"
    )
    assert "sft 2 min 05 s" in time(nodes, [*history, made("sft", 5, seconds=125.0)]), "with its earlier attempts"


def test_sft_alone_saves_what_the_other_nodes_took() -> None:
    history = [made("assisted", 7), made("sft", 100), made("assisted", 60), made("opd", 40), made("opd", 9, "other")]
    assert lines_of([SFT], history, opd=None)["saved"] == (
        "assisted, mining, opd, control are skipped: about 1 min 40 s when last made (assisted 1 min 00 s, opd 40 s)"
    )
    unknown = lines_of([SFT], [], opd=None, refresh={"control": False})
    assert unknown["saved"] == "assisted, mining, opd are skipped"


def test_without_a_last_run_it_takes_its_flop_by_the_rate_of_a_gpu() -> None:
    use = stage_uses([ROLLOUT, SFT], qwen_sizes())["sft"]
    gpu = GpuModel(80e9, node_flop(SFT, use) / 10, 0.25)
    text = time([ROLLOUT, SFT], [], gpu)
    assert text.startswith("about 40 s; if a GPU reaches ") and text.endswith("known after a first run: rollout")
    logs = node_of("logs", paths=["a.jsonl"], temperature=0, rows=2000, max_tokens=1024)
    mining = node_of("mining", {"trajectories": "logs"})
    gpu = GpuModel(80e9, node_flop(mining, stage_uses([logs, mining], qwen_sizes())["mining"]) / 40, 1.0)
    for shards, took in (1, "40 s"), (4, "10 s"):
        assert f": mining {took}; " in time([logs, mining], [], gpu, shards=shards)
