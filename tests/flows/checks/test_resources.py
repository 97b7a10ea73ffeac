"""Memory is compared where it is needed: a GPU's with the models, the host's with tables and what passes through."""

from __future__ import annotations

import pytest

from draftsmith.flows.checks import resources
from draftsmith.flows.checks.findings import Findings
from draftsmith.stages.estimates import of_logs, of_mining, of_opd, of_sft
from draftsmith.stages.mining import MiningConfig
from draftsmith.stages.parallel.config import ParallelConfig
from draftsmith.stages.prompting.logs_config import LogsConfig
from draftsmith.stages.targets.estimate import ANSWER_BYTES, PROCESS, TABLES, Answers, Estimate, Use
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.on_policy.config import OpdConfig
from tests.flows.checks.test_estimates import qwen_sizes

ANSWERS = Answers(longest=4608, count=100_000)


def lines(monkeypatch: pytest.MonkeyPatch, estimate: Estimate, gpus: tuple[float, ...], host: float) -> dict[str, str]:
    """Check → level and text."""
    monkeypatch.setattr(resources, "gpus", lambda: gpus)
    monkeypatch.setattr(resources, "memory_bytes", lambda: host)
    found = Findings()
    resources._compare_memory(found, "sft", estimate, elsewhere=False)
    return {line.check: f"{line.level.value} {line.text}" for line in found.lines}


def test_beside_a_gpu_the_host_must_hold_tables_and_what_passes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = qwen_sizes()
    estimate = of_sft(SftConfig(), Use(sizes, answers=ANSWERS))
    assert estimate.host == {"tables": TABLES + ANSWER_BYTES * 100_000}
    found = lines(monkeypatch, estimate, (141e9,), 64e9)
    assert found.keys() == {"sft: memory", "sft: host memory"}
    assert found["sft: memory"].startswith("ok") and "141.0 GB of GPU memory" in found["sft: memory"]
    checkpoint = 0.75 * estimate.memory["drafter with AdamW"]
    assert checkpoint >= 12 * sizes.drafter.parameters
    needed = PROCESS + TABLES + ANSWER_BYTES * 1e5 + 2 * 4_022_468_096 + checkpoint
    assert f"ok about {needed / 1e9:.1f} GB: target 8.0 GB" in found["sft: host memory"]
    assert lines(monkeypatch, estimate, (141e9,), 8e9)["sft: host memory"].startswith("error")


def test_gpus_that_torch_cannot_use_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for names, count in ([], 0), (["GPU-a1"], 1):
        monkeypatch.setattr(resources, "gpu_names", lambda names=names: names)
        found = Findings()
        resources.check_accelerators(found)
        assert len(found.lines) == count
        assert all("GPU-a1: torch" in line.text and "compute on the CPU" in line.text for line in found.lines)


def test_a_process_reads_whole_checkpoints_where_moments_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = qwen_sizes()
    split = {"processes": 8, "shard_optimiser": True}
    estimate = of_sft(SftConfig.model_validate({"parallel": split}), Use(sizes, answers=ANSWERS))
    said = lines(monkeypatch, estimate, (141e9,) * 8, 512e9)["sft: host memory"]
    assert f"drafter with AdamW {12 * sizes.drafter.parameters / 1e9:.1f} GB" in said


def test_without_a_gpu_tables_count_beside_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = of_mining(MiningConfig(), Use(qwen_sizes(), answers=ANSWERS))
    found = lines(monkeypatch, estimate, (), 64e9)
    assert found.keys() == {"sft: memory"}
    needed = sum(estimate.memory.values()) + TABLES + ANSWER_BYTES * 1e5
    assert f"about {needed / 1e9:.1f} GB" in found["sft: memory"]


def test_tables_of_a_stage_without_models_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of unknown length too."""
    config = LogsConfig(paths=["a.jsonl"], temperature=0, scored=0)
    estimate = of_logs(config, Use(qwen_sizes()))
    assert not estimate.memory and estimate.host == {"tables": TABLES}
    assert lines(monkeypatch, estimate, (141e9,), 0.5e9)["sft: host memory"].startswith("error")
    assert lines(monkeypatch, estimate, (), 8e9)["sft: memory"].startswith("ok")


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (OpdConfig(verification="greedy"), 0),
        (OpdConfig(), 2),  # forward KL, if the answers were sampled: copies of the target's logits too
        (SftConfig(loss="forward_kl", compute_dtype="float32"), 2),
    ],
)
def test_copies_of_logits_that_a_loss_keeps_are_counted(config: SftConfig | OpdConfig, more: int) -> None:
    use = Use(qwen_sizes(), answers=ANSWERS)
    needed = of_opd(config, use) if isinstance(config, OpdConfig) else of_sft(config, use)
    assert needed.memory["logits"] == of_sft(SftConfig(), use).memory["logits"] + more * 512 * 151936 * 4


def test_a_drafter_that_is_taken_as_it_is_needs_no_training() -> None:
    """However many processes the section names."""
    sizes = qwen_sizes()
    parallel = ParallelConfig(processes=8)
    config = SftConfig(steps=0, init_from="z-lab/Qwen3-4B-DFlash-b16", sequences_per_step=8, parallel=parallel)
    needed = of_sft(config, Use(sizes, answers=ANSWERS))
    of_drafter = {"drafter": 4.0 * sizes.drafter.parameters}
    assert needed.memory == {"process": PROCESS, "target": 2.0 * sizes.target.parameters} | of_drafter
    assert (needed.processes, needed.passing) == (1, {})
    assert needed.files == {"drafters": 2.0 * sizes.drafter.parameters}
