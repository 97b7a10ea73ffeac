"""A trained head in a copy of its target's checkpoint, read again by transformers and by the project."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import create_drafter, load_drafter, save_drafter
from draftsmith.stages.drafters.mtp.config import MtpConfig
from draftsmith.stages.drafters.stitched import HEAD_FILE, INDEX_FILE, export_stitched
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.drafters.mtp.test_checkpoint import N, edited, setting
from tests.testbed import random_target
from tests.testbed.mtp import MODELS, native_head, target_with_head

WEIGHTS = "model.safetensors"


def sharded(folder: Path) -> None:
    """Split a model's file: the head's tensors, with one of the target's, are in the second."""
    tensors = load_file(folder / WEIGHTS)
    second = {name for name in tensors if name.startswith((N, "model.mtp_layers.", "mtp.", "lm_head"))}
    parts = {"model-00001-of-00002.safetensors": tensors.keys() - second, "model-00002-of-00002.safetensors": second}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, names in parts.items() for name in names},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def without_head(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith(N)]:
        del tensors[name]


def moved_head(target: Target, folder: Path) -> dict[str, torch.Tensor]:
    """Write a head with other weights than the target's in `folder`; return its tensors by name."""
    head = create_drafter(MtpConfig(kind="mtp"), target, 0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(1.5)
    save_drafter(head, folder, torch.float32)
    return load_file(folder / WEIGHTS)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("shards", [False, True])
def test_a_copy_has_the_new_head_and_all_else_unchanged(family: str, shards: bool, tmp_path: Path) -> None:
    target = target_with_head(tmp_path, family)
    model, copy = tmp_path / "model", tmp_path / "copy"
    head = moved_head(target, tmp_path / "head")
    if shards:
        sharded(model)
    before = all_tensors(model)
    export_stitched(tmp_path / "head", model, copy)
    after = all_tensors(copy)
    assert after.keys() == before.keys() and all(
        torch.equal(after[name], head.get(name, before[name])) for name in after
    )
    assert {file.name for file in copy.iterdir()} == {file.name for file in model.iterdir()}
    changed = {file.name for file in copy.iterdir() if not file.samefile(model / file.name)}
    assert changed == ({"model-00002-of-00002.safetensors"} if shards else {WEIGHTS}), "all others are hard links"
    assert all(torch.equal(tensor, before[name]) for name, tensor in all_tensors(model).items())
    ids = torch.tensor([random_target.trajectories(1)[0].tokens])
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (model, copy)]
    assert torch.equal(*(each(ids).logits for each in models))
    read = load_drafter(copy, target).state_dict()
    expected = load_drafter(tmp_path / "head", target).state_dict()
    assert all(torch.equal(read[name], value) for name, value in expected.items())


@pytest.mark.parametrize("shards", [False, True])
def test_a_target_without_a_head_gets_one(shards: bool, tmp_path: Path) -> None:
    target, model, copy = target_with_head(tmp_path, "glm4_moe"), tmp_path / "model", tmp_path / "copy"
    edited(without_head)(model)
    setting(num_nextn_predict_layers=0)(model)
    head = moved_head(target, tmp_path / "head")
    if shards:
        sharded(model)
    before = all_tensors(model)
    export_stitched(tmp_path / "head", model, copy)
    assert all_tensors(copy).keys() == before.keys() | head.keys()
    raw, own = (json.loads((folder / "config.json").read_text()) for folder in (copy, model))
    assert raw == own | {"num_nextn_predict_layers": 1}
    if shards:
        index = json.loads((copy / INDEX_FILE).read_text())
        assert {index["weight_map"][name] for name in head} == {HEAD_FILE}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in all_tensors(copy).values())
    (tmp_path / "again").mkdir()
    shutil.copytree(copy, tmp_path / "again" / "model")
    assert native_head(Target.load(random_target.resolved(tmp_path / "again"), device="cpu")).block_size == 4


def test_quantised_heads_are_refused(tmp_path: Path) -> None:
    target, model = target_with_head(tmp_path, "glm4_moe"), tmp_path / "model"
    moved_head(target, tmp_path / "head")
    shutil.copytree(model, tmp_path / "quantised")
    edited(lambda tensors: tensors.update({f"{N}.eh_proj.weight_scale_inv": torch.zeros(1, 1)}))(tmp_path / "quantised")
    with pytest.raises(DraftsmithError, match="shows that the MTP head is quantised"):
        export_stitched(tmp_path / "head", tmp_path / "quantised", tmp_path / "copy")
    edited(without_head)(model)
    setting(quantization_config={"quant_method": "fp8"})(model)
    with pytest.raises(DraftsmithError, match="is quantised and has no MTP head, so engines would read a new one"):
        export_stitched(tmp_path / "head", model, tmp_path / "copy")


def test_a_drafter_of_another_kind_is_refused(tmp_path: Path) -> None:
    target = random_target.random_target(tmp_path)
    save_drafter(random_target.random_drafter(target), tmp_path / "drafter", torch.float32)
    with pytest.raises(DraftsmithError, match=r"is a dflash, and no part of a target's checkpoint"):
        export_stitched(tmp_path / "drafter", tmp_path / "model", tmp_path / "copy")
