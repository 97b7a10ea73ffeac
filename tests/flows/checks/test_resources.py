"""Estimates of memory, disk and time, and their comparison with the machine."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from draftsmith.artifacts.store.manifest import InputEntry, Manifest
from draftsmith.flows.checks import resources
from draftsmith.flows.checks.estimates import Need
from draftsmith.flows.checks.findings import Findings, Level
from draftsmith.flows.checks.resources import Hardware
from draftsmith.flows.checks.work import GPUS, Work
from draftsmith.flows.planning.graph import Node, topological_order
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.graph import refresh_nodes
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.runtime.stage import Config
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.targets.estimate import PROCESS_BYTES, AnswerCounts, ModelSize, Sizes
from draftsmith.stages.training.config import SftConfig
from tests.flows.checks.test_check import QWEN3_4B
from tests.flows.processes import ROOT
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.refresh import load_config, node_of, small_refresh

TARGET, OTHER = TargetConfig(source="/models/one"), TargetConfig(source="/models/other")
TRAINED = ("target", "trajectories")


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


def test_needs_of_the_recipe_equal_a_calculation_by_hand() -> None:
    sizes = qwen_sizes()
    needed = resources._needs(recipe(), sizes)
    # per layer: q, o 2560·4096, k, v 2560·1024, three of 2560·9728, norms; then fc 5·2560·2560 and two norms
    layer = 2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    parameters = 5 * layer + 5 * 2560 * 2560 + 2 * 2560
    assert sizes.drafter.parameters == parameters
    opd, servers = needed["opd"], needed["assisted"].servers
    assert 0.6 * 80e9 < opd.memory < 0.86 * 80e9  # one of 8 processes: 3 of 24 answers
    answers = needed["assisted"].makes
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
    servers = resources._needs(nodes, sizes)["assisted"].servers
    assert servers is not None
    assert servers.requests == 32 * (512 + 4096 + 16) * (70_272 + 2 * 5 * 128 * 2)


def test_answers_take_no_more_disk_space_than_estimated(tiny_drafter: DrafterArtifacts) -> None:
    from draftsmith.artifacts.tables.parquet import read_table
    from draftsmith.artifacts.tables.schemas import TRAJECTORIES

    path = tiny_drafter.rollout / "trajectories.parquet"
    rows = read_table(path, TRAJECTORIES).to_pylist()
    tokens = sum(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)
    assert path.stat().st_size < 4 * tokens < 10 * path.stat().st_size


def test_mining_of_logs_without_a_number_of_rows_takes_an_unknown_time() -> None:
    logs, mining = node_of("logs", paths=["a.jsonl"], temperature=0), node_of("mining", {"trajectories": "logs"})
    for node, work in ((logs, None), (node_of("logs", paths=["a.jsonl"], temperature=0, rows=2000), 2000 * 40960)):
        need = resources._needs([node, mining], qwen_sizes())["mining"]
        assert need.work == (None if work is None else ("replay", pytest.approx(work)))


def test_nodes_before_the_first_drafter_are_estimated_without_one(tiny_drafter: DrafterArtifacts) -> None:
    """A run until the answers."""
    config = RefreshConfig.model_validate(small_refresh("tiny", "nowhere", "prompts.jsonl", 32))
    nodes = {node.name: node for node in refresh_nodes(config)}
    answers = [nodes[name] for name in ("target", "prompts", "rollout")]
    sizes = resources.model_sizes(answers, tiny_drafter.target, {}, CPU)
    assert sizes is not None
    assert resources._needs(answers, sizes)["rollout"].memory > PROCESS_BYTES + 4 * sizes.target.parameters
    assert resources.model_sizes([*answers, nodes["sft"]], tiny_drafter.target, {}, CPU) is None


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
    machine, findings = Hardware(gpus, host, None, "GPU"), Findings()
    for elsewhere in (False, True):  # the memory of another machine is unknown
        resources._compare(findings, node_of("sft"), need, "", machine, elsewhere=elsewhere)
    assert [(line.check, line.level) for line in findings.lines] == [("sft: needs", level), ("sft: needs", Level.OK)]


def test_gpus_that_torch_cannot_use_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for names, count in ([], 0), (["GPU-a1"], 1):
        monkeypatch.setattr(resources, "gpu_names", lambda names=names: names)
        findings = Findings()
        resources.check_accelerators(findings)
        assert [line.check for line in findings.lines] == ["GPUs"] * count


def made(stage: str, config: Config, seconds: float, inputs: tuple[str, ...] = (), **metrics: float) -> Manifest:
    """Return an artifact of one target, or of the other one."""
    key = ("1" if config != OTHER else "2") * 64
    entries = {name: InputEntry(stage=name, key="1" * 64, content_id="c" * 64, volatile_id="") for name in inputs}
    return Manifest(
        schema_version=1, stage=stage, key=key, content_id="c" * 64, created_at="",
        config=config.model_dump(mode="json"), inputs=entries, external={}, code_digest="", modules={}, seed=0,
        files={}, metrics=metrics, mlflow_run_id=None, duration_s=seconds, versions={},
    )  # fmt: skip


GPU, CPU = Hardware((80e9,), 64e9, None, "GPU"), Hardware((), 64e9, None, "CPU")


def seconds(
    stage: str,
    config: Config,
    need: Need,
    history: list[Manifest],
    target: TargetConfig = TARGET,
    machine: Hardware = GPU,
    **elsewhere: bool,
) -> float | None:
    """Return the estimated seconds of a node; by default on a GPU without a known rate."""
    inputs = {name: name for name in (TRAINED if stage == "sft" else ("target",))}
    node = Node(stage, STAGES[stage], config, inputs)
    nodes = [Node("target", "draftsmith.stages.targets.stage", target), node]
    took, _ = resources._time(
        node, need, resources._History(history, nodes), qwen_sizes(), machine, **{"elsewhere": False, **elsewhere}
    )
    return took


def test_time_is_estimated_from_the_last_run_and_its_size() -> None:
    asked, few = SftConfig(steps=200), SftConfig(steps=50)
    here = [made("target", TARGET, 30), made("rollout", RolloutConfig(), 60, ("target",), answers=100.0)]
    assert seconds("rollout", RolloutConfig(), Need(makes=AnswerCounts(100, count=300)), here) == 180
    assert seconds("rollout", RolloutConfig(), Need(makes=AnswerCounts(100, count=300)), here, OTHER) is None
    sft = made("sft", few, 100, TRAINED)
    assert seconds("sft", asked, Need(), [*here, sft]) == 400
    sft.metrics["seconds"] = 60.0  # of its steps: the process starts once, however many there are
    assert seconds("sft", asked, Need(), [*here, sft]) == 40 + 240
    sft.metrics["seconds"] = 125.0  # includes earlier attempts
    assert seconds("sft", asked, Need(), [*here, sft]) == 500
    many = SftConfig.model_validate({"steps": 50, "parallel": {"processes": 4}})
    assert seconds("sft", asked, Need(), [*here, made("sft", many, 100, TRAINED)]) == 1600
    eagle = SftConfig.model_validate({"steps": 200, "drafter": {"kind": "eagle3"}})
    assert seconds("sft", eagle, Need(), [*here, sft]) is None


def test_time_without_a_last_run_is_estimated_from_measured_rates() -> None:
    need = Need(work=("decode", 5010.0))
    assert seconds("rollout", RolloutConfig(), need, [], machine=CPU) == pytest.approx(10 * 4_022_468_096 / 135e6)
    assert seconds("rollout", RolloutConfig(), need, [], machine=CPU, elsewhere=True) is None
    assert seconds("rollout", RolloutConfig(), Need(), [], machine=CPU) is None


def test_time_on_a_known_gpu_is_arithmetic() -> None:
    machine = Hardware.assumed(GPUS["H100"])
    need = Need(on_gpu={"target": Work(650e12), "drafter": Work(bytes=3e12)}, steps=10, server_starts=1)
    assert seconds("sft", SftConfig(), need, [], machine=machine) == pytest.approx(20 + resources._SERVER_START_S)
    many_launches = Need(on_gpu={"mining": Work(650e9, launches=1e6)})
    assert seconds("sft", SftConfig(), many_launches, [], machine=machine) == pytest.approx(5)
