"""Every trap of the format of checkpoints is refused with one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import check_shape, load_drafter
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import model_path
from tests.stages.drafters.edits import Edit, cut, edit_tensors, remove, save, setting, within, without, write
from tests.testbed import random_target
from tests.testbed.architectures import RANDOM
from tests.testbed.dspark import random_dspark
from tests.testbed.eagle3 import RANDOM_VOCABULARY

V = random_target.VOCAB_SIZE
SLIDING = ["sliding_attention"] * 2
EAGLE = "eagle_aux_hidden_state_layer_ids"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.0}

DFLASH: dict[str, tuple[Edit, str]] = {
    "a weight is no number": (
        edit_tensors(lambda t: t["norm.weight"][:1].fill_(float("nan"))),
        r"norm\.weight holds NaN or infinite weights \(1 in all\)",
    ),
    "the weights are cut short": (cut("model.safetensors"), r"model\.safetensors: cannot be read"),
    "the weights are gone": (remove("model.safetensors"), r"model\.safetensors: cannot be read"),
    "the config is gone": (remove("config.json"), r"config\.json: cannot be read"),
    "the config is cut short": (cut("config.json"), r"config\.json: cannot be read"),
    "the config is no object": (write("config.json", "[]"), r"config\.json"),
    "no layer ids": (without("dflash_config.target_layer_ids"), "target_layer_ids is missing"),
    "no mask token": (without("dflash_config.mask_token_id"), "mask_token_id is missing"),
    "no block size": (without("block_size", "dflash_config.block_size"), "block_size is missing"),
    "two block sizes": (setting(block_size=7), "block_size"),
    "another width": (setting(hidden_size=48), "hidden_size is 48, the target's is 32"),
    "another vocabulary": (setting(vocab_size=99), "vocab_size is 99, the target's is 64"),
    "another depth": (setting(num_target_layers=9), "num_target_layers is 9"),
    "another rotary base": (within("rope_parameters", rope_theta=5e5), "rope_theta is"),
    "another rotary base in an old config": (
        lambda folder: [edit(folder) for edit in (without("rope_parameters"), setting(rope_theta=5e5))],
        "rope_theta is",
    ),
    "no rotary base": (without("rope_parameters", "rope_theta"), "rope"),
    "another rotary type": (within("rope_parameters", rope_type="linear", factor=4.0), "rope"),
    "a part of the head rotates": (within("rope_parameters", partial_rotary_factor=0.5), "rope|rotary"),
    "angles that an engine computes otherwise": (
        within("rope_parameters", rope_type="dynamic", factor=2.0),
        "rope_parameters has rope_type dynamic, which SGLang computes differently",
    ),
    "a scale of angles that an engine does not read": (
        within("rope_parameters", **YARN),
        "rope_parameters has attention_factor",
    ),
    "windows that an engine ignores": (
        setting(layer_types=SLIDING, sliding_window=4),
        "use_sliding_window is not true",
    ),
    "windows of no size": (setting(layer_types=SLIDING, use_sliding_window=True), "field sliding_window is missing"),
    "small windows read both ways": (
        setting(layer_types=SLIDING, sliding_window=4, use_sliding_window=True, is_causal=False),
        "sliding_window 4 is smaller than the block of 5",
    ),
    "layers of another kind": (setting(layer_types=["chunked_attention", "full_attention"]), "contains chunked"),
    "kinds of other layers": (setting(layer_types=["full_attention"]), "layer_types"),
    "no truth value": (setting(is_causal=1), "is_causal is 1"),
    "norms of Gemma": (setting(use_gemma_norm=True), "use_gemma_norm is true"),
    "interleaved rotation": (setting(rope_is_neox_style=False), "rope_is_neox_style is false"),
    "interleaved rotation, older name": (setting(is_neox_style=False), "is_neox_style"),
    "another activation": (setting(hidden_act="gelu"), 'hidden_act is "gelu"'),
    "quantised weights": (setting(quantization_config={"quant_method": "fp8"}), "quantization_config"),
    "settings in a place that engines prefer": (setting(text_config={"is_causal": True}), "text_config"),
    "an embedding of its own": (setting(has_embed_tokens=True), "has_embed_tokens is true"),
    **{
        f"{field} of dflash_config": (within("dflash_config", **{field: value}), rf"dflash_config\.{field} is ")
        for field, value in {
            "attention_value_scale": 0.5,
            "attention_sink_bias": True,
            "output_multiplier": 0.25,
            "final_logit_softcapping": 30.0,
            "conv_kernel_size": 3,
            "selector_rank": 8,
            "projector_type": "domino",
            "sample_from_anchor": False,
        }.items()
    },
    "a projector named at the top": (setting(projector_type="domino"), "projector_type"),
    "another method's architecture": (setting(architectures=["DFlashLagunaForCausalLM"]), "DFlashLagunaForCausalLM"),
    "a layer that the target lacks": (within("dflash_config", target_layer_ids=[0, 4]), r"target_layer_ids \[0, 4\]"),
    "no layers at all": (within("dflash_config", target_layer_ids=[]), "target_layer_ids"),
    "a mask token outside": (within("dflash_config", mask_token_id=64), "mask_token_id"),
    "another target": (
        write("drafter.json", json.dumps({"digest": "", "target_digest": "f" * 64})),
        "trained for the target ffffffffffff",
    ),
    "a damaged record": (write("drafter.json", '{"target_'), r"drafter\.json"),
    "frequent tokens cut short": (cut("frequent_tokens.npy"), r"frequent_tokens\.npy"),
}
DFLASH2: dict[str, tuple[Edit, str]] = {
    "no selector": (
        without("dflash_config.selector_rank", "dflash_config.selector_top_k"),
        "needs dflash_config.selector_rank",
    ),
    "half a convolution": (within("dflash_config", conv_kernel_size=0), "together"),
    "groups that do not fit": (within("dflash_config", conv_group_size=7), "does not divide"),
    "a size that is none": (within("dflash_config", selector_rank="wide"), "selector_rank"),
    "more candidates than are negative": (within("dflash_config", selector_top_k=-1), "top_k"),
    "a cap that is none": (within("dflash_config", final_logit_softcapping=-3), "final_logit_softcapping is -3"),
    "a scale that is none": (within("dflash_config", output_multiplier=0), "output_multiplier is"),
    "a sink": (within("dflash_config", attention_sink_bias=True), "attention_sink_bias"),
    "another model that chooses": (setting(architectures=["DFlash2BeamDraftModel"]), "not DFlash"),
    "a plain drafter with convolutions": (
        setting(architectures=["DFlashDraftModel"]),
        r"dflash_config\.conv_kernel_size",
    ),
}
DSPARK: dict[str, tuple[Edit, str]] = {
    "no bias": (setting(markov_rank=0), "markov_rank is 0"),
    "no rank": (without("markov_rank"), "markov_rank is missing"),
    "no kind": (without("markov_head_type"), "markov_head_type is missing"),
    "two kinds": (within("dflash_config", markov_head_type="rnn"), "is given as vanilla and as rnn"),
    "another head": (setting(markov_head_type="rnn"), "markov_head_type is 'rnn'"),
    "a confidence without its width": (
        setting(confidence_head_with_markov=False),
        r"has the wrong shape for confidence_head\.proj\.weight",
    ),
    "no word of a confidence": (setting(confidence_head_with_markov=None), "confidence_head_with_markov is"),
    "two block sizes": (setting(block_size=7), "block_size is given as 7 and as 4"),
    "no proposals": (
        lambda folder: [edit(folder) for edit in (setting(block_size=0), without("dflash_config.block_size"))],
        "block_size is 0",
    ),
    "inside its target": (setting(dspark_markov_rank=6), "dspark_markov_rank belongs to a drafter inside"),
    "no word": (setting(sample_from_anchor="yes"), "sample_from_anchor is 'yes'"),
}
EAGLE3: dict[str, tuple[Edit, str]] = {
    "no map to the target's tokens": (edit_tensors(lambda t: t.pop("d2t")), "lacks tensor d2t"),
    "no mask of the draft vocabulary": (edit_tensors(lambda t: t.pop("t2d")), "lacks tensor t2d"),
    "d2t holds ids": (
        edit_tensors(lambda t: t.update({"d2t": t["d2t"] + torch.arange(RANDOM_VOCABULARY)})),
        r"model\.safetensors: d2t and t2d name different tokens",
    ),
    "d2t holds ids by frequency": (
        edit_tensors(lambda t: t.update({"d2t": (t["d2t"] + torch.arange(RANDOM_VOCABULARY)).flip(0)})),
        r"model\.safetensors: d2t does not give rising token ids",
    ),
    "t2d holds one more": (
        edit_tensors(lambda t: t.update({"t2d": torch.ones(V, dtype=torch.bool)})),
        "d2t and t2d name different tokens",
    ),
    "two layers": (setting(num_hidden_layers=2), r"config\.json: num_hidden_layers is 2"),
    "another architecture": (
        setting(architectures=["LlamaForCausalLMEagle"]),
        r"config\.json: architectures is \['LlamaForCausalLMEagle'\]\. .*DFlashDraftModel or .*LlamaForCausalLMEagle3",
    ),
    "a head that is the embedding": (setting(tie_word_embeddings=True), "tie_word_embeddings is true"),
    "no vocabulary": (without("vocab_size"), "field vocab_size is missing"),
    "no rotary base": (
        without("rope_parameters", "rope_theta"),
        r"config\.json: field rope_parameters\.rope_theta is missing",
    ),
    "a part of the head rotates": (within("rope_parameters", partial_rotary_factor=0.5), "partial_rotary_factor"),
    "another rotary base in one place": (
        within("rope_parameters", rope_theta=5e5),
        "rope_theta is 10000.0 at the top and 500000.0 in rope_parameters",
    ),
    "interleaved rotation": (setting(rope_is_neox_style=False), "rope_is_neox_style is false"),
    "another activation": (setting(hidden_act="gelu"), 'hidden_act is "gelu"'),
    "two features": (setting(num_aux_hidden_states=2), "num_aux_hidden_states is 2"),
    "another width": (setting(hidden_size=48), "hidden_size is 48, the target's is 32"),
    "a larger draft vocabulary": (setting(draft_vocab_size=41), "wrong shape for d2t"),
    "a layer that the target lacks": (
        within("eagle_config", **{EAGLE: [0, 1, 4]}),
        r"target_layer_ids \[0, 1, 4\] do not fit layers 0 … 3",
    ),
    "a layer twice": (within("eagle_config", **{EAGLE: [0, 1, 1]}), "name a layer twice"),
    "two layers of the target": (within("eagle_config", **{EAGLE: [0, 1]}), "reads 3 target layers, not 2"),
    **{
        f"{field} {place}": (edit, rf"config\.json: {field} is set")
        for field in (
            *("norm_output", "fc_norm", "use_aux_norm", "norm_before_fc", "target_hidden_size"),
            *("bias", "mlp_bias", "attention_bias"),
        )
        for place, edit in (
            ("at the top", setting(**{field: True})),
            ("inside", within("eagle_config", **{field: True})),
        )
    },
}
TRAPS = {"dflash": DFLASH, "dflash2": DFLASH2, "dspark": DSPARK, "eagle3": EAGLE3}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, traps in TRAPS.items() for name in traps])
def test_a_trap_is_one_clear_error(kind: str, name: str, plain_target: Target, tmp_path: Path) -> None:
    edit, message = TRAPS[kind][name]
    drafter = random_dspark(plain_target) if kind == "dspark" else RANDOM[kind](plain_target)  # with confidence
    saved = save(drafter, plain_target, tmp_path)
    edit(saved)
    with pytest.raises(DraftsmithError, match=message) as error:
        load_drafter(saved, plain_target)
    assert "\n" not in str(error.value) and str(saved) in str(error.value)


@pytest.mark.parametrize("name", ["another width", "no layer ids", "another rotary base", "another depth"])
def test_the_preflight_finds_a_wrong_shape_without_weights(
    name: str, plain_target: Target, plain_artifact: Path, tmp_path: Path
) -> None:
    saved = save(random_target.random_drafter(plain_target), plain_target, tmp_path)
    (saved / "model.safetensors").unlink()
    check_shape(saved, model_path(plain_artifact))
    edit, message = DFLASH[name]
    edit(saved)
    with pytest.raises(DraftsmithError, match=message):
        check_shape(saved, model_path(plain_artifact))
