"""Memory is compared where it is needed: a GPU's with the models, the host's with tables and what passes through."""

from __future__ import annotations

import pytest

from draftsmith.flows.checks import resources
from draftsmith.flows.checks.findings import Findings
from draftsmith.stages.estimates import of_logs, of_mining, of_sft
from draftsmith.stages.mining import MiningConfig
from draftsmith.stages.prompting.logs_config import LogsConfig
from draftsmith.stages.targets.estimate import ANSWER_BYTES, PROCESS, TABLES, Answers, Estimate, Use
from draftsmith.stages.training.config import SftConfig
from tests.flows.checks.test_check import qwen_sizes

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
