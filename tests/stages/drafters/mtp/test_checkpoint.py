"""Native heads in checkpoints: in a target's, in a folder of their own, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import (
    check_complete,
    create_drafter,
    load_drafter,
    plan_of_new,
    read_target_config,
    save_drafter,
)
from draftsmith.stages.drafters.mtp.checkpoint import check_head, new_config
from draftsmith.stages.drafters.mtp.config import MtpConfig
from draftsmith.stages.drafters.mtp.families import find_head
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.drafters.texts import Texts
from tests.testbed import random_target
from tests.testbed.mtp import MODELS, native_head, target_with_head, write_model

SHAPE = MtpConfig(kind="mtp")
Edit = Callable[[Path], None]


@pytest.fixture(scope="module", params=MODELS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return target_with_head(tmp_path_factory.mktemp(request.param), request.param)


def test_a_folder_of_its_own_has_the_targets_tensors_and_config(target: Target, tmp_path: Path) -> None:
    assert target.folder is not None
    head = native_head(target, block_size=5)
    save_drafter(head, tmp_path / "head", torch.float32)
    check_complete(tmp_path / "head")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "head", target.folder))
    assert ours and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    heads = ("model.layers.2.", "model.mtp_layers.0.", "mtp.")
    assert ours.keys() == {name for name in theirs if name.startswith(heads)}, "all of them"
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "head", target.folder))
    assert ours == {**theirs, "block_size": 5, "mtp_engine": "sglang"}
    loaded = load_drafter(tmp_path / "head", target)
    assert (loaded.kind, loaded.block_size) == ("mtp", 5)
    assert Texts(target, loaded).alone(0, 12)[1] == Texts(target, head).alone(0, 12)[1]
    assert torch.equal(Texts(target, loaded).alone(0, 12)[0], Texts(target, head).alone(0, 12)[0])
    save_drafter(loaded, tmp_path / "again", torch.float32)
    for path in (tmp_path / "head").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_a_folder_from_elsewhere_drafts_three_tokens_as_sglang_serves_it(target: Target, tmp_path: Path) -> None:
    """It has the target's config.json unchanged."""
    assert target.folder is not None
    shutil.copytree(target.folder, tmp_path / "head")
    loaded = load_drafter(tmp_path / "head", target)
    assert (loaded.block_size, loaded.config.mtp_engine) == (4, "sglang")


def test_its_plan_counts_what_it_has(target: Target) -> None:
    assert target.folder is not None
    plan, head = plan_of_new(SHAPE, read_target_config(target.folder), lambda: None), native_head(target)
    assert plan.parameters == sum(parameter.numel() for parameter in head.parameters())
    assert plan.block_size == 4 and plan.target_layer_ids == [1]
    assert "native MTP head" in plan.description and "as SGLang serves it" in plan.description


def edited(edit: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    """Return an edit of the tensors."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        edit(tensors)
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def setting(**fields: object) -> Edit:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def without_head(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".2." in name]:
        del tensors[name]


def damaged(name: str, content: str) -> Edit:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)  # the model's file is shared by tests
        (folder / name).write_text(content)

    return change


N = "model.layers.2"
BAD: dict[str, tuple[Edit, str]] = {
    "no head": (edited(without_head), rf"no MTP head: {N}\.eh_proj\.weight is missing\. An export of transformers"),
    "a tensor is missing": (
        edited(lambda tensors: tensors.pop(f"{N}.mlp.experts.3.up_proj.weight")),
        rf"model\.safetensors: the MTP head lacks {N}\.mlp\.experts\.3\.up_proj\.weight \(1 in all\)",
    ),
    "a tensor is unknown": (
        edited(lambda tensors: tensors.update({f"{N}.other.weight": torch.zeros(3)})),
        rf"model\.safetensors: the MTP head has {N}\.other\.weight, which is unknown",
    ),
    "another shape": (
        edited(lambda tensors: tensors.update({f"{N}.eh_proj.weight": torch.zeros(32, 32)})),
        rf"model\.safetensors: {N}\.eh_proj\.weight has shape \[32, 32\], and by config\.json \[32, 64\]",
    ),
    "quantised": (
        edited(lambda tensors: tensors.update({f"{N}.eh_proj.weight_scale_inv": torch.zeros(1, 1)})),
        rf"model\.safetensors: {N}\.eh_proj\.weight_scale_inv shows that the MTP head is quantised",
    ),
    "a file that is none": (damaged("model.safetensors", "x"), r"model\.safetensors: cannot be read \("),
    "an index without a map": (
        damaged("model.safetensors.index.json", "{}"),
        r"index\.json: cannot be read \('weight_map'\)\. Copy or download",
    ),
    "an index that is none": (damaged("model.safetensors.index.json", "[]"), r"index\.json: cannot be read \("),
    "several layers": (
        setting(num_nextn_predict_layers=3),
        r"config\.json: num_nextn_predict_layers is 3, and only heads of one layer are supported",
    ),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_head_is_refused_by_file_and_tensor_without_loading(problem: str, tmp_path: Path) -> None:
    edit, message = BAD[problem]
    write_model(tmp_path, "glm4_moe")
    edit(tmp_path)
    config = new_config(SHAPE, read_target_config(tmp_path), lambda: None)
    with pytest.raises(DraftsmithError, match=message):
        check_head(tmp_path, config)


def test_copies_of_the_targets_embedding_and_head_are_not_the_heads(tmp_path: Path) -> None:
    write_model(tmp_path, "glm4_moe")
    copies = {f"{N}.{name}.weight": torch.zeros(72, 32) for name in ("embed_tokens", "shared_head.head")}
    edited(lambda tensors: tensors.update(copies))(tmp_path)
    check_head(tmp_path, new_config(SHAPE, read_target_config(tmp_path), lambda: None))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    target = target_with_head(tmp_path, "mimo")
    assert target.folder is not None
    name = "model.mtp_layers.0.input_proj.weight"
    edited(lambda tensors: tensors[name].fill_(torch.nan))(target.folder)
    with pytest.raises(DraftsmithError, match=rf"model\.safetensors: {name} holds NaN"):
        create_drafter(SHAPE, target, 0)


def test_another_family_is_refused_by_name(tmp_path: Path) -> None:
    random_target.write_model(tmp_path)
    config = read_target_config(tmp_path)
    assert find_head(tmp_path, config) is None
    with pytest.raises(DraftsmithError, match=r"head of qwen3 is not known here\. Known are those of mimo, glm4_moe"):
        new_config(SHAPE, config, lambda: None)
    edited(lambda tensors: tensors.update({"model.mtp_block.0.fc.weight": torch.zeros(3)}))(tmp_path)
    with pytest.raises(DraftsmithError, match=r"model\.safetensors: model\.mtp_block\.0\.fc\.weight belongs to an MTP"):
        find_head(tmp_path, config)


def test_the_head_of_another_target_is_refused(tmp_path: Path) -> None:
    mimo, other = target_with_head(tmp_path / "mimo", "mimo"), target_with_head(tmp_path / "glm", "glm4_moe")
    save_drafter(native_head(mimo), tmp_path / "head", torch.float32)
    with pytest.raises(DraftsmithError, match="model_type is qwen2, the target's is glm4_moe"):
        load_drafter(tmp_path / "head", other)


def test_a_published_mimo_names_its_own_code_and_is_a_qwen2(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "mimo")
    code = {"AutoConfig": "configuration_mimo.MiMoConfig", "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"}
    setting(model_type="mimo", auto_map=code)(tmp_path / "model")
    target = Target.load(random_target.resolved(tmp_path), device="cpu")
    assert type(target.model).__name__ == "Qwen2ForCausalLM"
    assert native_head(target).family.prefix == "model.mtp_layers.0."
