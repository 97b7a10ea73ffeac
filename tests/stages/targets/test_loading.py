"""An incomplete checkpoint, or one whose class fails, is one clear error and no target of random weights.

Quantised ones are loaded by transformers, named, and distinguished by their digests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.config import TargetConfig, check_weights, model_folder
from draftsmith.stages.targets.describe import describe
from draftsmith.stages.targets.info import TargetInfo
from tests.stages.drafters.edits import set_fields
from tests.testbed.families import FAMILIES, WORDS, family_config, write_family
from tests.testbed.random_target import fill, save, write_artifact, write_model

WEIGHTS = "model.safetensors"
SLIDING = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}


def described(folder: Path) -> TargetInfo:
    location = str(folder)
    return describe(folder, TargetConfig(source=location), kind="folder", location=location, revision=None)


def change(model: Path, name: str, weight: torch.Tensor | None) -> None:
    tensors = load_file(model / WEIGHTS)
    del tensors[name]
    save_file(tensors if weight is None else tensors | {name: weight}, model / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "weight", "said"),
    [
        ("model.layers.1.self_attn.o_proj.weight", None, r"lack model.layers.1.self_attn.o_proj.weight \(1 tensors"),
        ("lm_head.weight", None, "lack lm_head.weight"),
        ("model.embed_tokens.weight", None, "lack model.embed_tokens.weight"),
        ("model.norm.weight", torch.ones(8), r"model.norm.weight has shape \[8\], and by config.json \[32\]"),
    ],
)
def test_incomplete_weights_are_refused(name: str, weight: torch.Tensor | None, said: str, tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path)
    change(tmp_path / "model", name, weight)
    with pytest.raises(DraftsmithError, match=rf"model/{WEIGHTS}: .*{said}"):
        Target.load(artifact, device="cpu")


def test_one_of_tied_weights_is_enough_and_the_vision_part_is_not_read(tmp_path: Path) -> None:
    write_family(tmp_path, "Gemma 3 with images")
    tensors = load_file(tmp_path / WEIGHTS)
    text = {name: weight for name, weight in tensors.items() if "vision" not in name}
    assert len(text) < len(tensors) and not any("lm_head" in name for name in text)
    save_file(text, tmp_path / WEIGHTS, metadata={"format": "pt"})
    Target.from_source(tmp_path, dtype="float32", device="cpu")


def test_a_causal_lm_inside_another_model_is_used(tmp_path: Path) -> None:
    """The outer model has no head."""
    pytest.importorskip("transformers", minversion="5.24")
    from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config

    vision = {"model_type": "radio", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "patch_size": 4, "image_size": 16, "max_img_size": 64}
    config = NemotronH_Omni_Reasoning_V3_Config(
        text_config=family_config("Nemotron-H"), vision_config=vision | {"video_temporal_patch_size": 2},
        projector_hidden_size=16, vision_hidden_size=16, image_token_id=0,
    )  # fmt: skip
    model = NemotronH_Omni_Reasoning_V3(config)
    fill(model, 0)
    save(model, tmp_path, WORDS)
    target = Target.from_source(tmp_path, dtype="float32", device="cpu")
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(target.logits(target.read(ids).hidden), expected, atol=1e-4, rtol=1e-4)
    (tmp_path / "cut").mkdir()
    for path in tmp_path.glob("*.json"):
        (tmp_path / "cut" / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if "lm_head" not in n}, tmp_path / "cut" / WEIGHTS, {"format": "pt"})
    with pytest.raises(DraftsmithError, match=r"lack language_model\.lm_head\.weight"):
        Target.from_source(tmp_path / "cut", dtype="float32", device="cpu")


def test_a_layer_without_one_of_its_experts_is_one_clear_error(tmp_path: Path) -> None:
    write_family(tmp_path, "Qwen3-MoE")
    change(tmp_path, "model.layers.1.mlp.experts.3.up_proj.weight", None)
    with pytest.raises(DraftsmithError, match=WEIGHTS):
        Target.from_source(tmp_path, dtype="float32", device="cpu")


@pytest.mark.parametrize("failing", ["model.model.forward", "model.get_output_embeddings"])
def test_a_class_that_fails_is_named(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = write_artifact(tmp_path)
    from transformers import Qwen3ForCausalLM, Qwen3Model

    def fail(*_args: object, **_kwargs: object) -> None:
        raise KeyError("full_attention")

    owner = Qwen3Model if failing == "model.model.forward" else Qwen3ForCausalLM
    monkeypatch.setattr(owner, failing.split(".")[-1], fail)
    with pytest.raises(DraftsmithError, match=r"Qwen3ForCausalLM .*KeyError: 'full_attention'"):
        Target.load(artifact, device="cpu")


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(28, "No space left on device"), RuntimeError("CUDA error: 2")]
)
def test_errors_of_the_machine_do_not_blame_the_model(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = write_artifact(tmp_path)

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr("draftsmith.stages.targets.causal_lm.check_agreement", refuse)
    with pytest.raises(type(error)):
        Target.load(artifact, device="cpu")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(DraftsmithError, match=r"CUDA out of memory.*CUDA_VISIBLE_DEVICES"):
        Target.load(artifact, device="cpu")


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({"architectures": ["Qwen_3ForCausalLM"], "auto_map": {"AutoConfig": "its.Own"}}, True),
        ({"architectures": ["OurFineTuneForCausalLM"]}, True),
        ({"architectures": ["OurFineTuneForCausalLM"], "auto_map": {"AutoConfig": "its.Own"}}, False),
        ({"architectures": ["OurFineTune"]}, False),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, False),
    ],
)
def test_the_model_type_decides_for_an_unknown_architecture_name(
    fields: dict[str, object], known: bool, tmp_path: Path
) -> None:
    write_model(tmp_path)
    set_fields("config.json", **fields)(tmp_path)
    with nullcontext() if known else pytest.raises(DraftsmithError, match="is not a causal language model"):
        Target.from_source(tmp_path, dtype="float32", device="cpu")


def test_nan_logits_are_one_clear_error(tmp_path: Path) -> None:
    """They are not reported as an unknown model: weights may overflow in float16."""
    artifact = write_artifact(tmp_path)
    change(tmp_path / "model", "model.norm.weight", torch.full((32,), torch.nan))
    with pytest.raises(DraftsmithError, match="weights are damaged"):
        Target.load(artifact, device="cpu")


WRONG_SIZES: list[Any] = [-1, 0, 10**30, "8", []]


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        (
            "config.json",
            {"rope_parameters": {"rope_type": "own", "rope_theta": 1e4}},
            r"cannot build a model from its config.json \(KeyError: 'own'\)",
        ),
        ("config.json", {"hidden_act": "own"}, r"cannot build a model from its config.json \(KeyError: 'own'\)"),
        *(
            ("config.json", {field: value}, rf"config\.json: .*\b{field}\b")
            for field in ("hidden_size", "num_key_value_heads", "max_position_embeddings", "vocab_size", "rms_norm_eps")
            for value in WRONG_SIZES
        ),
        *(
            (
                "config.json",
                {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4} | {name: -1}},
                name,
            )
            for name in ("rope_theta", "factor")
        ),
        ("config.json", SLIDING | {"sliding_window": None}, "cannot build a model from its config.json"),
        ("config.json", SLIDING | {"sliding_window": 0}, "sliding_attention over 0 positions are not supported"),
        ("generation_config.json", {"eos_token_id": "<end>"}, "eos_token_id '<end>' is not a token id"),
        ("generation_config.json", {"max_new_tokens": "many"}, r"generation_config\.json: cannot be read"),
    ],
    ids=str,
)
def test_wrong_fields_in_small_files_are_one_clear_error(
    file: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_model(tmp_path)
    set_fields(file, **fields)(tmp_path)
    with pytest.raises(DraftsmithError, match=said):
        described(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "3", "{", "[" * 20_000])
def test_an_invalid_generation_config_is_one_clear_error(content: str, tmp_path: Path) -> None:
    """Before the model is loaded, which would fail with another error."""
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(DraftsmithError, match=r"generation_config\.json: cannot be read"):
        described(tmp_path)


def test_end_ids_outside_the_vocabulary_are_ignored(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 3, 64, 10**9]}))
    assert described(tmp_path).eos_ids == [3, 63]


def test_biases_without_a_place_in_the_model_are_one_clear_error(tmp_path: Path) -> None:
    """Without them the model would differ from the checkpoint's."""
    artifact = write_artifact(tmp_path)
    weights = tmp_path / "model" / WEIGHTS
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32), "model.of_images.bias": torch.ones(3)}
    save_file(load_file(weights) | bias, weights, metadata={"format": "pt"})
    with pytest.raises(DraftsmithError, match=r"model\.layers\.0\.self_attn\.q_proj\.bias"):
        Target.load(artifact, device="cpu")


def test_tensors_in_two_files_are_refused(tmp_path: Path) -> None:
    """transformers and servers would load different ones."""
    write_model(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    names = sorted(tensors)
    halves = {"a.safetensors": names[:20], "b.safetensors": names[20:]}

    def write_shards() -> None:
        for file, half in halves.items():
            save_file({name: tensors[name] for name in half}, tmp_path / file, metadata={"format": "pt"})

    index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    write_shards()
    with pytest.raises(DraftsmithError, match=rf"index\.json .*{WEIGHTS}"):
        described(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    described(tmp_path)
    halves["b.safetensors"] = names[19:]
    write_shards()
    with pytest.raises(DraftsmithError, match=rf"b\.safetensors: {names[19]}"):
        described(tmp_path)
    (tmp_path / f"{WEIGHTS}.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(DraftsmithError, match=r"index\.json: names no weights"):
        described(tmp_path)


@pytest.mark.parametrize("beside", [(), ("config.json",)])
def test_the_folder_of_an_adapter_is_reported_as_such(beside: tuple[str, ...], tmp_path: Path) -> None:
    """As peft saves it, or with the config of its model."""
    for name in ("adapter_config.json", "adapter_model.safetensors", *beside):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DraftsmithError, match=r"an adapter without its model\. Merge it with peft's merge_and_unload"):
        model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / WEIGHTS).write_text("")
    assert model_folder(str(tmp_path)) == tmp_path


Tensors = dict[str, torch.Tensor]


def write(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def say(folder: Path, **settings: Any) -> None:
    set_fields("config.json", quantization_config=settings)(folder)


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
    monkeypatch.setitem(FAMILIES["gpt-oss"][1], "intermediate_size", 64)
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
