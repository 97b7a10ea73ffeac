"""Quantised checkpoints: loaded by transformers, named, and distinguished by their digests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.source import check_weights
from tests.testbed.families import SHAPE, write_family
from tests.testbed.random_target import write_model

WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


def write(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def say(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def fp8(folder: Path, _monkeypatch: pytest.MonkeyPatch) -> tuple[Tensors, str]:
    """Write float8 weights with one scale per block of 128 x 128, larger than a tiny matrix."""
    write_model(folder)
    weights, expected = {}, {}
    for name, weight in load_file(folder / WEIGHTS).items():
        weights[name] = weight
        if weight.dim() == 2 and "layers" in name:
            scale = weight.abs().max() / 448
            weights[name] = (weight / scale).to(torch.float8_e4m3fn)
            weights[name.replace("weight", "weight_scale_inv")] = scale.view(1, 1)
            expected[name] = weights[name].float() * scale
    write(folder, weights)
    say(folder, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128])
    assert len(expected) == 28
    return expected, "weight_scale_inv"


_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # and their negatives


def mxfp4(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensors, str]:
    """Write four-bit experts like gpt-oss: the first of a byte in the lower bits, and a power of two for 32."""
    monkeypatch.setitem(SHAPE, "intermediate_size", 64)
    write_family(folder, "gpt-oss")
    generator = torch.Generator().manual_seed(0)
    weights, expected = {}, {}
    for name, weight in load_file(folder / WEIGHTS).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weights[name] = weight
            continue
        count, width, height = weight.shape
        blocks = torch.randint(0, 256, (count, height, width // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(123, 126, (count, height, width // 32), dtype=torch.uint8, generator=generator)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
        numbers = torch.cat([_FP4, -_FP4])[codes] * 2.0 ** (scales.float()[..., None] - 127)
        expected[name] = numbers.flatten(-2).transpose(1, 2)
    write(folder, weights)
    say(folder, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
    assert len(expected) == 6
    return expected, "_scales"


@pytest.mark.parametrize("made", [fp8, mxfp4], ids=["fp8", "mxfp4"])
def test_weights_are_the_numbers_times_their_scales(
    made: Callable[[Path, pytest.MonkeyPatch], tuple[Tensors, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU, transformers dequantises them."""
    expected, _ = made(tmp_path, monkeypatch)
    target = Target.from_source(tmp_path, dtype="float32", device="cpu")
    assert target.info.quantisation == made.__name__
    loaded = dict(target.model.named_parameters())
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("made", [fp8, mxfp4], ids=["fp8", "mxfp4"])
def test_the_digest_covers_quantised_numbers_and_their_method(
    made: Callable[[Path, pytest.MonkeyPatch], tuple[Tensors, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafter belongs to one of these targets, not to the checkpoint before quantisation."""
    _, of_scales = made(tmp_path, monkeypatch)
    digests = {Target.from_source(tmp_path, dtype=dtype, device="cpu").info.digest for dtype in ("float32", "bfloat16")}
    assert len(digests) == 1, "whatever they are loaded as"

    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["model.embed_tokens", "lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    digests.add(Target.from_source(tmp_path, dtype="float32", device="cpu").info.digest)
    tensors = load_file(tmp_path / WEIGHTS)
    name = min(name for name in tensors if name.endswith(of_scales))
    write(tmp_path, tensors | {name: tensors[name] * 2 if of_scales == "weight_scale_inv" else tensors[name] + 1})
    digests.add(Target.from_source(tmp_path, dtype="float32", device="cpu").info.digest)
    assert len(digests) == 3


def test_a_quantisation_without_its_package_is_one_clear_error(tmp_path: Path) -> None:
    write_model(tmp_path)
    say(tmp_path, quant_method="aqlm")
    with pytest.raises(DraftsmithError, match="aqlm"):
        Target.from_source(tmp_path, device="cpu")


def test_a_missing_scale_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = fp8(tmp_path, monkeypatch)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.layers.0.of_four_bits.weight_scale"] = torch.ones(2, 2).to(torch.float8_e4m3fn)
    write(tmp_path, tensors)
    assert check_weights(tmp_path) == [tmp_path / WEIGHTS]
    name = min(expected)
    del tensors[f"{name}_scale_inv"]
    write(tmp_path, tensors)
    with pytest.raises(DraftsmithError, match=rf"{name} .*no scale"):
        check_weights(tmp_path)
