"""Estimates of memory and disk, and their comparison with the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from draftsmith.flows.checks import memory
from draftsmith.flows.checks.findings import Findings, Level
from draftsmith.flows.checks.memory import Hardware, Need, stage_uses
from draftsmith.flows.planning.graph import Node, topological_order
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.graph import refresh_nodes
from draftsmith.stages.targets.estimate import PROCESS_BYTES, ModelSize, Sizes
from tests.flows.checks.test_check import QWEN3_4B
from tests.flows.processes import ROOT
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.refresh import load_config, node_of, small_refresh

CPU = Hardware((), 64e9, None)


def qwen_sizes() -> Sizes:
    from transformers import Qwen3Config

    from draftsmith.stages.drafters.checkpoint import plan_of_new
    from draftsmith.stages.drafters.dflash.config import DFlashConfig

    target = Qwen3Config(**QWEN3_4B)
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda _: None)  # the mask token is an unused row
    drafter = plan_of_new(DFlashConfig(mask_token=151669), target, lambda: tokenizer)
    return Sizes(
        ModelSize.from_config(target, 4_022_468_096),
        ModelSize.from_config(drafter.config, drafter.parameters),
        features=5,
        block_size=16,
        itemsize=2,
        longest_prompt=512,
        positions=40960,
        kind=drafter.kind,
        deepest=max(drafter.target_layer_ids) + 1,
        operations=drafter.operations,
        device_memory=80e9,
        accelerated=True,
    )


def recipe(*overrides: str) -> list[Node]:
    return topological_order(refresh_nodes(load_config(ROOT / "configs" / "qwen3-4b-dflash.yaml", overrides)))


def needs_of(nodes: list[Node], sizes: Sizes) -> dict[str, Need]:
    by_name = {node.name: node for node in nodes}
    return {name: memory.node_need(by_name[name], use) for name, use in stage_uses(nodes, sizes).items()}


def test_needs_of_the_recipe_equal_a_calculation_by_hand() -> None:
    sizes = qwen_sizes()
    needed = needs_of(recipe(), sizes)
    # per layer: q, o 2560·4096, k, v 2560·1024, three of 2560·9728, norms; then fc 5·2560·2560 and two norms
    layer = 2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    parameters = 5 * layer + 5 * 2560 * 2560 + 2 * 2560
    assert sizes.drafter.parameters == parameters
    opd, servers = needed["opd"], needed["assisted"].servers
    assert 0.6 * 80e9 < opd.memory < 0.86 * 80e9  # one of 8 processes: 3 of 24 answers
    answers = stage_uses(recipe(), sizes)["opd"].answers
    assert answers is not None
    copies = 4 * answers.count * answers.longest + (8 * 15 + 24) * answers.verify_steps
    assert (opd.processes, opd.disk, opd.temporary_disk) == (8, 2 * parameters, 36 * parameters + copies)
    assert opd.loaded == 12 * parameters
    per_token = 2 * 36 * 8 * 128 * 2 + 2 * 5 * 8 * 128 * 2
    assert servers is not None and servers.gpus == 8
    assert (servers.weights, servers.requests) == (
        2 * (4_022_468_096 + parameters),
        32 * (512 + 4096 + 16) * per_token,
    )
    assert not needed["assisted"].memory, "servers make the answers"
    untrained = needed["sft"]
    assert (untrained.processes, untrained.temporary_disk) == (1, 0)
    assert untrained.memory == PROCESS_BYTES + 2 * 4_022_468_096 + 4 * parameters


def test_every_gpu_of_a_server_has_the_whole_latent() -> None:
    """The keys and values of a drafter's 8 heads are divided among 16 GPUs as among 8."""
    from transformers import DeepseekV3Config

    nodes = recipe("rollout.engine.launch.tensor_parallel=16", "assisted.engine.launch.tensor_parallel=16")
    sizes = replace(qwen_sizes(), target=ModelSize.from_config(DeepseekV3Config(), 0))
    servers = needs_of(nodes, sizes)["assisted"].servers
    assert servers is not None
    assert servers.requests == 32 * (512 + 4096 + 16) * (70_272 + 2 * 5 * 128 * 2)


def test_answers_take_no_more_disk_space_than_estimated(tiny_drafter: DrafterArtifacts) -> None:
    from draftsmith.artifacts.tables.parquet import read_table
    from draftsmith.artifacts.tables.schemas import TRAJECTORIES

    path = tiny_drafter.rollout / "trajectories.parquet"
    rows = read_table(path, TRAJECTORIES).to_pylist()
    tokens = sum(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)
    assert path.stat().st_size < 4 * tokens < 10 * path.stat().st_size


def test_nodes_before_the_first_drafter_are_estimated_without_one(tiny_drafter: DrafterArtifacts) -> None:
    """A run until the answers."""
    config = RefreshConfig.model_validate(small_refresh("tiny", "nowhere", "prompts.jsonl", 32))
    nodes = {node.name: node for node in refresh_nodes(config)}
    answers = [nodes[name] for name in ("target", "prompts", "rollout")]
    sizes = memory.model_sizes(answers, tiny_drafter.target, {}, CPU)
    assert sizes is not None
    assert needs_of(answers, sizes)["rollout"].memory > PROCESS_BYTES + 4 * sizes.target.parameters
    assert memory.model_sizes([*answers, nodes["sft"]], tiny_drafter.target, {}, CPU) is None


@pytest.mark.parametrize(
    ("need", "gpus", "host", "level"),
    [
        (Need(memory=60e9, tables=1e9, loaded=8e9), (80e9,), 64e9, Level.OK),
        (Need(memory=60e9, tables=1e9, loaded=8e9), (80e9,), 6e9, Level.ERROR),
        (Need(memory=70e9, tables=1e9), (80e9,), 64e9, Level.WARNING),
        (Need(memory=120e9, tables=1e9), (80e9,), 64e9, Level.ERROR),
        (Need(memory=20e9, tables=1e9, processes=4), (), 64e9, Level.WARNING),
    ],
)
def test_gpu_and_host_memory_are_compared_separately(
    need: Need, gpus: tuple[float, ...], host: float, level: Level
) -> None:
    """GPU memory holds the models; host memory holds tables and passing weights, and all processes share it."""
    machine, findings = Hardware(gpus, host, None), Findings()
    for elsewhere in (False, True):  # the memory of another machine is unknown
        memory._compare(findings, node_of("sft"), need, machine, elsewhere=elsewhere)
    assert [(line.check, line.level) for line in findings.lines] == [("sft: needs", level), ("sft: needs", Level.OK)]


def test_gpus_that_torch_cannot_use_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for names, count in ([], 0), (["GPU-a1"], 1):
        monkeypatch.setattr(memory, "gpu_names", lambda names=names: names)
        findings = Findings()
        memory.check_accelerators(findings, [])
        assert [line.check for line in findings.lines] == ["GPUs"] * count


@pytest.mark.parametrize(
    ("program", "variables", "missing"),
    [("gcc", {}, ""), ("clang", {}, ""), ("", {}, "gcc or clang"), ("gcc", {"CC": "icx"}, "icx")],
)
def test_nodes_that_load_a_model_on_a_gpu_need_a_c_compiler(
    program: str, variables: dict[str, str], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "gpu_names", lambda: ["GPU-a1"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if program:
        (tmp_path / program).touch(0o755)
    findings = Findings()
    memory.check_accelerators(findings, [node_of("gate"), node_of("sft"), node_of("mining")])
    said = f"{missing} is missing, which Triton needs to compile kernels for sft, mining."
    assert [line.text.startswith(said) for line in findings.lines] == [True] * bool(missing)
