"""Every trap of the format of EAGLE-3 checkpoints is refused with one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.target.causal_lm import Target
from tests.stages.drafters.edits import Edit, edit_config, edit_tensors
from tests.testbed import random_target
from tests.testbed.eagle3 import RANDOM_VOCABULARY

H, V = random_target.HIDDEN_SIZE, random_target.VOCAB_SIZE
EAGLE = "eagle_aux_hidden_state_layer_ids"


def set_variant(field: str, place: str) -> Edit:
    return edit_config(lambda c: (c if place == "at the top" else c["eagle_config"]).update({field: True}))


TRAPS: dict[str, tuple[Edit, str]] = {
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
    "two layers": (
        edit_config(lambda c: c.update(num_hidden_layers=2)),
        r"config\.json: num_hidden_layers is 2",
    ),
    "another architecture": (
        edit_config(lambda c: c.update(architectures=["LlamaForCausalLMEagle"])),
        r"config\.json: architectures is \['LlamaForCausalLMEagle'\]\. Supported architectures: DFlashDraftModel or .*"
        "LlamaForCausalLMEagle3",
    ),
    "a head that is the embedding": (
        edit_config(lambda c: c.update(tie_word_embeddings=True)),
        r"config\.json: tie_word_embeddings is true",
    ),
    "no vocabulary": (edit_config(lambda c: c.pop("vocab_size")), r"config\.json: field vocab_size is missing"),
    "no rotary base": (
        edit_config(lambda c: (c.pop("rope_parameters"), c.pop("rope_theta"))),
        r"config\.json: field rope_parameters\.rope_theta is missing",
    ),
    "a part of the head rotates": (
        edit_config(lambda c: c["rope_parameters"].update(partial_rotary_factor=0.5)),
        r"config\.json: partial_rotary_factor",
    ),
    "interleaved rotation": (edit_config(lambda c: c.update(rope_is_neox_style=False)), "rope_is_neox_style is false"),
    "another activation": (edit_config(lambda c: c.update(hidden_act="gelu")), 'hidden_act is "gelu"'),
    "two features": (edit_config(lambda c: c.update(num_aux_hidden_states=2)), "num_aux_hidden_states is 2"),
    "another width": (edit_config(lambda c: c.update(hidden_size=48)), "hidden_size is 48, the target's is 32"),
    "a larger draft vocabulary": (edit_config(lambda c: c.update(draft_vocab_size=41)), "wrong shape for d2t"),
    "a layer that the target lacks": (
        edit_config(lambda c: c["eagle_config"].update({EAGLE: [0, 1, 4]})),
        r"target_layer_ids \[0, 1, 4\] do not fit layers 0 … 3",
    ),
    "a layer twice": (edit_config(lambda c: c["eagle_config"].update({EAGLE: [0, 1, 1]})), "name a layer twice"),
    "two layers of the target": (
        edit_config(lambda c: c["eagle_config"].update({EAGLE: [0, 1]})),
        r"reads 3 target layers, not 2",
    ),
    **{
        f"{field} {place}": (
            set_variant(field, place),
            rf"config\.json: {field} is set",
        )
        for field in (
            *("norm_output", "fc_norm", "use_aux_norm", "norm_before_fc", "target_hidden_size"),
            *("bias", "mlp_bias", "attention_bias"),
        )
        for place in ("at the top", "inside")
    },
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_one_clear_error(name: str, saved: Path, plain_target: Target) -> None:
    edit, message = TRAPS[name]
    edit(saved)
    with pytest.raises(DraftsmithError, match=message) as error:
        load_drafter(saved, plain_target)
    assert "\n" not in str(error.value)
    assert str(saved) in str(error.value)
