"""A target divided over ranks computes the same as a whole one; targets that cannot be divided."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.launch import launch
from draftsmith.stages.runtime.stage import ParallelConfig
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.estimate import target_size
from draftsmith.stages.targets.info import model_path
from draftsmith.stages.targets.loading import check_divides
from draftsmith.stages.targets.stage import STAGE as TARGET
from draftsmith.stages.targets.stage import TargetConfig
from tests.stages.runtime.target_outputs import SHARING, TargetOutputs, load_outputs, write_outputs
from tests.testbed.context import RecordingContext
from tests.testbed.families import write_family

# without and with a norm of each head, experts, two kinds of rotation, a decoder inside another model, states, a latent
# of keys and values
FAMILIES = ["Mistral", "Qwen3-MoE", "Gemma 3 with images", "Qwen3-Next", "GLM-4.7-Flash"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, plain_artifact: Path) -> dict[str, Path]:
    made = {"Qwen3": plain_artifact}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp("family")
        write_family(folder / "model", family)
        context = RecordingContext.under(folder)
        TARGET.run(context, TargetConfig(source=str(folder / "model"), dtype="float32"))
        made[family] = context.out
    return made


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, artifacts: dict[str, Path]) -> Path:
    """Return the folder with the outputs of two ranks, for each family."""
    folder = tmp_path_factory.mktemp("outputs")
    launch(
        ParallelConfig(processes=SHARING, target_parallel=SHARING),
        write_outputs,
        ({name: str(path) for name, path in artifacts.items()}, str(folder)),
        notes=folder / "ranks",
        stop=threading.Event(),
    )
    return folder


@pytest.mark.parametrize("family", ["Qwen3", *FAMILIES])
def test_a_divided_target_computes_the_same_as_the_whole_one(
    family: str, artifacts: dict[str, Path], outputs: Path
) -> None:
    """To 1e-5 of the largest entry, in float32; and a rank holds as many parameters as `check` counts."""
    whole = TargetOutputs.compute(Target.load(artifacts[family], device="cpu"))
    size = target_size(model_path(artifacts[family]))
    assert 0.2 < size.divided / size.parameters < 1  # without experts, which transformers 5.25 keeps whole
    for rank in range(SHARING):
        part = load_outputs(family, rank, outputs)
        for name in ("features", "deepest_alone", "logprobs"):
            ours, theirs = getattr(part, name), getattr(whole, name)
            assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5, name
        assert part.parameters == size.parameters - size.divided // SHARING < whole.parameters == size.parameters


@pytest.mark.parametrize(
    ("family", "sharing", "fields", "message"),
    [
        ("LFM2", 2, {}, "transformers has no plan to divide Lfm2ForCausalLM by"),
        ("Mistral", 3, {}, "3 does not divide the num_attention_heads of the target, 4"),
        ("Mistral", 4, {}, "4 does not divide the num_key_value_heads of the target, 2"),
        ("Gemma 4", 2, {}, "2 does not divide the num_key_value_heads of the target, 1"),  # of one layer
        ("Mistral", 2, {"quantization_config": {"quant_method": "fp8"}}, "is quantised, and cannot be divided"),
    ],
)
def test_a_target_that_cannot_be_divided_is_an_error(
    family: str, sharing: int, fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    write_family(tmp_path, family)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(DraftsmithError, match=f"parallel.target_parallel: .*{message}"):
        check_divides(tmp_path, sharing)
    check_divides(tmp_path, 1)
