"""A target that ranks hold in parts says what it says whole, and which targets cannot be divided."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.launch import launch
from draftsmith.stages.runtime.stage import ParallelConfig
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.estimate import target_size
from draftsmith.stages.target.info import model_path
from draftsmith.stages.target.loading import check_divides
from draftsmith.stages.target.stage import STAGE as TARGET
from draftsmith.stages.target.stage import TargetConfig
from tests.stages.runtime.parts import SHARING, Said, said_by, say
from tests.testbed.context import RecordingContext
from tests.testbed.families import write_family

# without and with a norm of each head, experts, two kinds of rotation, a decoder inside another model, states
FAMILIES = ["Mistral", "Qwen3-MoE", "Gemma 3 with images", "Qwen3-Next"]


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
def said(tmp_path_factory: pytest.TempPathFactory, artifacts: dict[str, Path]) -> Path:
    """By two ranks, of each family."""
    folder = tmp_path_factory.mktemp("said")
    launch(
        ParallelConfig(processes=SHARING, target_parallel=SHARING),
        say,
        ({name: str(path) for name, path in artifacts.items()}, str(folder)),
        notes=folder / "ranks",
        stop=threading.Event(),
    )
    return folder


@pytest.mark.parametrize("family", ["Qwen3", *FAMILIES])
def test_parts_say_what_the_whole_target_says(family: str, artifacts: dict[str, Path], said: Path) -> None:
    """To 1e-5 of the largest entry, in float32; and a part is as large as `check` counts it."""
    whole = Said.by(Target.load(artifacts[family], device="cpu"))
    size = target_size(model_path(artifacts[family]))
    assert 0.3 < size.divided / size.parameters < 1
    for rank in range(SHARING):
        part = said_by(family, rank, said)
        for name in ("features", "alone", "logprobs"):
            ours, theirs = getattr(part, name), getattr(whole, name)
            assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5, name
        assert part.parameters == size.parameters - size.divided // SHARING < whole.parameters == size.parameters


@pytest.mark.parametrize(
    ("family", "sharing", "fields", "said"),
    [
        ("LFM2", 2, {}, "transformers has no plan to divide Lfm2ForCausalLM by: set it to 1"),
        ("Mistral", 3, {}, "3 does not divide the num_attention_heads of the target, 4"),
        ("Mistral", 4, {}, "4 does not divide the num_key_value_heads of the target, 2"),
        ("Gemma 4", 2, {}, "2 does not divide the num_key_value_heads of the target, 1"),  # of one layer
        ("Mistral", 2, {"quantization_config": {"quant_method": "fp8"}}, "is quantised, and cannot be divided"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    family: str, sharing: int, fields: dict[str, object], said: str, tmp_path: Path
) -> None:
    write_family(tmp_path, family)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(DraftsmithError, match=f"parallel.target_parallel: .*{said}"):
        check_divides(tmp_path, sharing)
    check_divides(tmp_path, 1)
