"""The estimates of memory and disk that `draftsmith check` prints are of the right size."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from draftsmith.flows.checks.estimates import disk, estimates
from draftsmith.flows.pipeline.graph import in_order
from draftsmith.flows.refresh.graph import refresh_nodes
from draftsmith.stages.engines.config import EmbeddedEngineConfig
from draftsmith.stages.engines.estimate import embedded_memory
from draftsmith.stages.targets.estimate import Sizes
from tests.flows.checks.test_check import QWEN3_4B
from tests.flows.pipeline.processes import ROOT
from tests.testbed.drafter import DrafterArtifacts


def qwen_sizes() -> Sizes:
    from transformers import Qwen3Config

    from draftsmith.stages.drafters.checkpoint import plan_of_new
    from draftsmith.stages.drafters.dflash.shape import DFlashConfig
    from draftsmith.stages.targets.estimate import ModelSize

    target = Qwen3Config(**QWEN3_4B)
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda _: None)  # the mask token is an unused row
    drafter = plan_of_new(DFlashConfig(mask_token=151669), target, lambda: tokenizer)
    return Sizes(
        ModelSize.of(target, 4_022_468_096),
        ModelSize.of(drafter.config, drafter.parameters),
        features=5,
        block_size=16,
        itemsize=2,
        longest_prompt=512,
        positions=40960,
        kind=drafter.kind,
        device_memory=80e9,
        accelerated=True,
    )


def test_what_is_packed_on_a_cpu_is_counted() -> None:
    engine, sizes = EmbeddedEngineConfig(), qwen_sizes()
    on_cpu = embedded_memory(engine, 512, True, 32000, replace(sizes, accelerated=False))
    assert on_cpu["packed head"] == 2 * 151936 * 2560
    assert on_cpu["packed drafter"] == on_cpu["drafter"] + 2 * 32000 * 2560
    assert "packed head" not in embedded_memory(engine, 512, False, None, sizes)
    assert "packed head" not in embedded_memory(engine, 512, False, None, replace(sizes, accelerated=False, itemsize=4))


def test_estimates_of_the_recipe_by_hand() -> None:
    from tests.testbed.refresh import load_config

    config = load_config(ROOT / "configs" / "qwen3-4b-dflash.yaml")
    sizes = qwen_sizes()
    needed = estimates(in_order(refresh_nodes(config)), sizes)
    # per layer: q, o 2560·4096, k, v 2560·1024, three of 2560·9728, norms; then fc 5·2560·2560 and two norms
    layer = 2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    parameters = 5 * layer + 5 * 2560 * 2560 + 2 * 2560
    assert sizes.drafter.parameters == parameters
    opd = needed["opd"].memory
    assert opd["target"] == 2 * 4_022_468_096
    assert opd["drafter with AdamW"] == 18 * parameters  # with a copy in bfloat16
    assert opd["logits"] == 5 * 512 * 151936 * 4
    assert 0.6 * 80e9 < sum(opd.values()) < 0.86 * 80e9  # one of 8 processes: 3 of 21 answers
    T, rows = 512 + 4096, 16384 // (512 + 4096)  # 32 query heads on 8: the mask, and a copy for each of 4
    assert needed["mining"].memory["attention mask"] == 5 * rows * T * (T + 512) * 2
    servers = needed["assisted"].servers
    assert servers is not None and servers.gpus == 8
    per_token = 2 * 36 * 8 * 128 * 2 + 2 * 5 * 8 * 128 * 2
    assert servers.parts["key/value memory of 32 requests"] == 32 * (512 + 4096 + 16) * per_token
    assert not needed["assisted"].memory  # the answers are made elsewhere
    assert disk(needed)["drafters"] == 3 * 2 * parameters
    assert "target" not in disk(needed)


def test_trajectories_take_no_more_disk_than_estimated(tiny_drafter: DrafterArtifacts) -> None:
    from draftsmith.artifacts.parquet import read_table
    from draftsmith.artifacts.schemas import TRAJECTORIES

    path = tiny_drafter.rollout / "trajectories.parquet"
    rows = read_table(path, TRAJECTORIES).to_pylist()
    tokens = sum(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)
    assert path.stat().st_size < 4 * tokens < 10 * path.stat().st_size
