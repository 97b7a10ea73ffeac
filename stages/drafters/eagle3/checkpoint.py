"""EAGLE-3 checkpoints in the layout that SGLang and vLLM load. Refuses other variants of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama.configuration_llama import LlamaConfig

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters import checkpoint_format
from draftsmith.stages.drafters.digest import WEIGHTS_FILE
from draftsmith.stages.drafters.eagle3.config import Eagle3Config
from draftsmith.stages.drafters.eagle3.model import FEATURES, Eagle3Drafter
from draftsmith.stages.drafters.spec import RawConfig
from draftsmith.stages.targets.causal_lm import Target

ARCHITECTURE = "LlamaForCausalLMEagle3"
MODEL = Eagle3Drafter
# Chains of 7, the depth of the paper's training-time test, if a checkpoint states no block size.
DEFAULT_BLOCK_SIZE = 8
# Variants of the layout under which the same tensors mean another model.
_UNSUPPORTED = (
    *("norm_output", "fc_norm", "use_aux_norm", "norm_before_fc", "target_hidden_size"),
    *("bias", "mlp_bias", "attention_bias"),
)
_EMBEDDING, _MAPS = "embed_tokens.weight", ("d2t", "t2d")
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
# At this depth or more, the three layers that SGLang captures by default differ.
_DEEP_ENOUGH = 7


def default_layer_ids(num_target_layers: int) -> list[int]:
    """Return the layers that SGLang captures by default: before layers 2, L/2 and L-3, so after the preceding ones.

    In targets of fewer than 7 layers two of these coincide; their layers are at the beginning, middle and end.
    """
    if num_target_layers >= _DEEP_ENOUGH:
        return [1, num_target_layers // 2 - 1, num_target_layers - 4]
    return [0, (num_target_layers - 1) // 2, num_target_layers - 2]


def new_config(shape: Eagle3Config, target_config: Any, tokenizer: Callable[[], Any]) -> LlamaConfig:  # noqa: ARG001
    """Return the config of a new drafter: widths, heads and rotary parameters are the target's."""
    layers = target_config.num_hidden_layers
    ids = list(shape.target_layer_ids or default_layer_ids(layers))
    draft_vocab_size = shape.draft_vocab_size or target_config.vocab_size
    if draft_vocab_size > target_config.vocab_size:
        raise DraftsmithError(
            f"sft.drafter.draft_vocab_size: {draft_vocab_size} is more than the target's {target_config.vocab_size} "
            "tokens. Lower or remove it."
        )
    return LlamaConfig(
        architectures=[ARCHITECTURE],
        **_with_heads_that_divide(checkpoint_format.target_fields(target_config)),
        intermediate_size=checkpoint_format.intermediate_size(target_config),
        num_hidden_layers=1,
        hidden_act="silu",
        mlp_bias=False,
        num_target_layers=layers,
        block_size=shape.block_size,
        draft_vocab_size=draft_vocab_size,
        eagle_config={_LAYER_IDS: ids, "use_aux_hidden_state": True},
    )


def _with_heads_that_divide(fields: RawConfig) -> RawConfig:
    """Return the fields with a number of heads that divides the width, as Llama requires; some targets' does not."""
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if hidden % heads == 0:
        return fields
    heads = max(count for count in range(1, max(2, hidden // fields["head_dim"] + 1)) if hidden % count == 0)
    return fields | {
        "num_attention_heads": heads,
        "num_key_value_heads": math.gcd(heads, fields["num_key_value_heads"]),
    }


def create(config: LlamaConfig, target: Target, frequent: torch.Tensor | None = None) -> Eagle3Drafter:
    """Create a drafter whose weights are not initialised.

    frequent: [V] token ids, most frequent first; it can propose the first `draft_vocab_size` of them.
    """
    size = config.draft_vocab_size
    if size < config.vocab_size and frequent is None:
        raise DraftsmithError("sft.drafter.draft_vocab_size: needs the frequencies of the target's tokens. Remove it.")
    chosen = torch.arange(size) if frequent is None else frequent[:size].cpu().sort().values
    return Eagle3Drafter(config, target.embedding, chosen)


def target_layer_ids(config: LlamaConfig) -> list[int]:
    """Return the target layers whose hidden states the drafter reads; none if the engine chooses them."""
    return list(config.eagle_config[_LAYER_IDS] or ())


def description(config: LlamaConfig, tokenizer: Callable[[], Any]) -> str:  # noqa: ARG001
    """Describe the shape in a few words."""
    return (
        f"EAGLE-3 on target layers {target_layer_ids(config)}, chains of {config.block_size - 1}, draft vocabulary "
        f"{config.draft_vocab_size:,} of {config.vocab_size:,} tokens"
    )


def parse(path: Path, raw: RawConfig) -> LlamaConfig:
    """Parse the config.json of a checkpoint.

    Without layer ids SGLang chooses the layers. Its choice depends on the target's depth, so `check_fits` sets the ids.
    """
    if raw.get("num_hidden_layers", 1) != 1:
        raise DraftsmithError(
            f"drafter {path}: num_hidden_layers is {raw['num_hidden_layers']}, and only one layer is supported. "
            "Choose another drafter."
        )
    eagle = raw.get("eagle_config") or {}
    for field in _UNSUPPORTED:
        if raw.get(field) or eagle.get(field):
            raise DraftsmithError(f"drafter {path}: {field} is set, and this variant is not supported. Use another.")
    checkpoint_format.refuse_other_models(path, raw, checkpoint_format.COMPUTED | {"num_aux_hidden_states": FEATURES})
    stated = {name: raw.get(name) for name in ("vocab_size", "hidden_size")}
    stated["rope_parameters.rope_theta"] = (raw.get("rope_parameters") or {}).get("rope_theta")
    checkpoint_format.require_kinds(path, [(name, value, value is not None) for name, value in stated.items()])
    if raw.get("tie_word_embeddings"):
        raise DraftsmithError(
            f"drafter {path}: tie_word_embeddings is true, but EAGLE-3 has its own head. Set it to false."
        )
    checkpoint_format.refuse_other_rotations(path, raw)
    raw |= {
        "num_hidden_layers": 1,
        "block_size": raw.get("block_size") or DEFAULT_BLOCK_SIZE,
        "draft_vocab_size": raw.get("draft_vocab_size") or raw["vocab_size"],
        "eagle_config": {_LAYER_IDS: None, **eagle},
    }
    ids = raw["eagle_config"][_LAYER_IDS]
    checkpoint_format.require_kinds(
        path,
        [
            ("block_size", raw["block_size"], checkpoint_format.is_block(raw["block_size"])),
            ("draft_vocab_size", raw["draft_vocab_size"], checkpoint_format.is_block(raw["draft_vocab_size"])),
            (f"eagle_config.{_LAYER_IDS}", ids, ids is None or checkpoint_format.are_integers(ids)),
        ],
    )
    config: LlamaConfig = checkpoint_format.parse_config(raw, LlamaConfig, ARCHITECTURE, path)
    return config


def check_fits(drafter: LlamaConfig, target: Any, where: str) -> None:
    """Refuse a drafter for a target of another shape.

    Rotary settings may differ from the target's: the drafter has its own, and engines read them from its config.
    """
    layers = target.num_hidden_layers
    eagle = drafter.eagle_config
    if eagle[_LAYER_IDS] is None:
        if layers < _DEEP_ENOUGH:
            raise DraftsmithError(
                f"drafter {where}: eagle_config.{_LAYER_IDS} is missing, and no engine chooses three of {layers} "
                "target layers by itself. Add it."
            )
        eagle[_LAYER_IDS] = default_layer_ids(layers)
    checkpoint_format.check_equal(
        where,
        [
            ("hidden_size", drafter.hidden_size, target.hidden_size),
            ("vocab_size", drafter.vocab_size, target.vocab_size),
            ("num_target_layers", getattr(drafter, "num_target_layers", layers), layers),
        ],
    )
    ids = target_layer_ids(drafter)
    if len(ids) != FEATURES:
        raise DraftsmithError(
            f"drafter {where}: EAGLE-3 reads {FEATURES} target layers, not {len(ids)}. Name {FEATURES}."
        )
    checkpoint_format.check_layer_ids(where, ids, layers, ask_for="Name three in sft.drafter.target_layer_ids.")


def save(drafter: Eagle3Drafter, folder: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint, with its maps of tokens."""
    chosen = drafter.draft_tokens.cpu()
    d2t = chosen - torch.arange(len(chosen))  # offsets: target id = draft id + d2t
    t2d = torch.isin(torch.arange(drafter.config.vocab_size), chosen)
    checkpoint_format.save(drafter, folder, dtype, others={"d2t": d2t, "t2d": t2d})


def own_name(name: str) -> str | None:
    """Return the name of a file's tensor in the model; None for the target's embedding and for maps."""
    return None if name in (_EMBEDDING, *_MAPS) else name


def load_weights(drafter: Eagle3Drafter, folder: Path, target: Target, dtype: torch.dtype) -> None:  # noqa: ARG001
    """Load the weights of a checkpoint, and its maps of tokens. Engines replace its embedding, if it has one."""
    tensors = checkpoint_format.read_tensors(folder)
    tensors.pop(_EMBEDDING, None)
    size, vocab = drafter.config.draft_vocab_size, drafter.config.vocab_size
    if size == vocab:  # checkpoints over the whole vocabulary may lack the maps
        tensors.setdefault("d2t", torch.zeros(size, dtype=torch.int64))
        tensors.setdefault("t2d", torch.ones(vocab, dtype=torch.bool))
    maps = {"d2t": (size,), "t2d": (vocab,)}
    checkpoint_format.load_tensors(drafter, folder, tensors, "EAGLE-3's layout", dtype, maps)
    drafter.draft_tokens = _draft_tokens(folder, tensors["d2t"], tensors["t2d"])


def _draft_tokens(folder: Path, d2t: torch.Tensor, t2d: torch.Tensor) -> torch.Tensor:
    """Return the target's ids of the draft vocabulary, sorted. Raises DraftsmithError if the maps disagree."""
    path = folder / WEIGHTS_FILE
    tokens = d2t.long() + torch.arange(len(d2t))
    if len(tokens) > 1 and not bool((tokens[1:] > tokens[:-1]).all()):
        raise DraftsmithError(f"drafter {path}: d2t does not give rising token ids. It must hold offsets, not ids.")
    if not torch.equal(tokens, t2d.nonzero()[:, 0]):
        raise DraftsmithError(f"drafter {path}: d2t and t2d name different tokens. Export the checkpoint again.")
    return tokens
