"""The layout of the speculators library, which vLLM loads, for DFlash, DFlash2 and DSpark: the same weights, another
config.

Source: github.com/vllm-project/speculators, 0.9.0 (`models/dflash/`, `models/dflash2/`, `models/dspark/`,
`convert/dflash/`). A layer id there counts the embedding as 0: it is one more than here. `block_size` counts a block's
queries: as many as proposals where the anchor's own is the one of offset 1, else one more. A checkpoint holds the
target's embedding and head too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from draftsmith.artifacts.errors import DraftsmithError

KIND = "speculators_model_type"  # the field that tells such a config
VERSION = "0.9.0"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
OF_THE_TARGET = (EMBEDDING, HEAD, "verifier_lm_head.weight", "verifier_norm.weight")
_KINDS = {"DFlashDraftModel": "dflash", "DFlash2DraftModel": "dflash2", "DSparkDraftModel": "dspark"}
_ALSO = {"Qwen3DSparkModel": "DSparkDraftModel"}  # SGLang's name of it
_SIZES = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
_UNARY = {"output_multiplier": 1, "final_logit_softcapping": 0}  # of a DFlash2, with what changes nothing
_HEADS: dict[str, Any] = {  # of a DSpark, with what the library takes where a config does not say
    "markov_rank": 256,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}
_FROM_ANCHOR = "sample_from_anchor"
_NOT_OF_THE_LAYERS = (
    "architectures",
    "auto_map",
    "block_size",
    "dflash_config",
    "is_causal",
    _FROM_ANCHOR,
    *_HEADS,
)


def to_speculators(raw: Mapping[str, Any], target: str, target_architectures: list[str]) -> dict[str, Any]:
    """config.json of a checkpoint of these kinds, as it is written here → that of speculators.

    target: where an engine finds the target. Raises DraftsmithError for a drafter that the library has no form for.
    """
    architecture, dflash = raw["architectures"][0], raw.get("dflash_config", {})
    architecture = _ALSO.get(architecture, architecture)
    if architecture not in _KINDS:
        raise DraftsmithError(
            f"drafter: speculators' layout has no form for {architecture}; export it without --format"
        )
    kind, both_ways = _KINDS[architecture], _both_ways(raw)
    if kind == "dflash2" and not dflash.get("conv_kernel_size"):
        raise DraftsmithError("drafter: it has no convolutions, without which speculators has no DFlash2")
    if mapped := [name for name, neutral in _UNARY.items() if (dflash.get(name) or neutral) != neutral]:
        raise DraftsmithError(
            f"drafter: dflash_config.{mapped[0]} is {dflash[mapped[0]]}, and speculators has no such field: export it "
            "without --format"
        )
    of_kind: dict[str, Any] = {name: dflash[name] for name in _SIZES} if kind == "dflash2" else {}
    proposals, from_anchor = raw["block_size"] - 1, False
    if kind == "dspark":
        if (head := raw["markov_head_type"]) != "vanilla":
            raise DraftsmithError(f"drafter: markov_head is {head}, and vLLM computes vanilla only: give it to SGLang")
        of_kind = {name: raw[name] for name in _HEADS}
        proposals, from_anchor = raw["block_size"], raw[_FROM_ANCHOR]
    return {
        "architectures": [architecture],
        KIND: kind,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": proposals}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target, "architectures": target_architectures},
        },
        "transformer_layer_config": {name: value for name, value in raw.items() if name not in _NOT_OF_THE_LAYERS},
        "draft_vocab_size": raw["vocab_size"],
        "block_size": proposals if from_anchor else proposals + 1,
        "aux_hidden_state_layer_ids": [layer + 1 for layer in dflash["target_layer_ids"]],
        "mask_token_id": dflash["mask_token_id"],
        "sliding_window_non_causal": both_ways,
        _FROM_ANCHOR: from_anchor,
        "tie_word_embeddings": False,
        **of_kind,
    }


def _both_ways(raw: Mapping[str, Any]) -> bool:
    """Do its layers read a block in both directions? Raises DraftsmithError where they differ, or full ones do not.

    The library asks that of sliding layers alone; vLLM takes the answer for all of them (vllm-project/vllm#56692).
    """
    causal, layers = raw.get("is_causal"), set(raw.get("layer_types") or ())
    if causal:
        raise DraftsmithError("drafter: is_causal is true, and speculators reads full layers in both directions")
    if "sliding_attention" not in layers or causal is False:
        return True
    if "full_attention" in layers:
        raise DraftsmithError(
            "drafter: its sliding layers read the block backwards only and its full ones do not, and vLLM would read "
            "all of them backwards: give it to SGLang, or train one whose layers are all of one kind"
        )
    return False


def from_speculators(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json of speculators → as it is written here. Raises DraftsmithError for what is not computed here."""
    kind, layers = raw[KIND], raw.get("transformer_layer_config")
    architecture = next((name for name, known in _KINDS.items() if known == kind), None)
    if not isinstance(layers, dict):
        raise DraftsmithError(
            f"drafter {where}: field transformer_layer_config is missing; export the checkpoint again"
        )
    if architecture is None:
        raise DraftsmithError(f"drafter {where}: {KIND} is {kind!r}, supported is {' or '.join(_KINDS.values())}")
    from_anchor = raw.get(_FROM_ANCHOR, kind == "dspark")
    for field, value, computed in (
        (_FROM_ANCHOR, from_anchor or False, from_anchor if kind == "dspark" else False),
        ("draft_vocab_size", raw.get("draft_vocab_size", layers.get("vocab_size")), layers.get("vocab_size")),
    ):
        if value != computed:
            raise DraftsmithError(f"drafter {where}: {field} is {value!r}, and only {computed!r} is computed here")
    ids, block = raw.get("aux_hidden_state_layer_ids"), raw.get("block_size")
    if kind == "dspark" and isinstance(block, int) and not from_anchor:
        block -= 1  # a DSpark's counts proposals here
    dflash = {
        "mask_token_id": raw.get("mask_token_id"),
        "target_layer_ids": None if ids is None else [layer - 1 for layer in ids],
        "block_size": block,
        **({name: raw.get(name) for name in _SIZES} if kind == "dflash2" else {}),
    }
    made = {**layers, "architectures": [architecture], "block_size": block, "dflash_config": dflash}
    if kind == "dspark":
        made |= {name: raw.get(name, usual) for name, usual in _HEADS.items()} | {_FROM_ANCHOR: from_anchor}
    sliding = "sliding_attention" in (layers.get("layer_types") or ())
    if sliding:
        made["use_sliding_window"] = True  # speculators reads sliding_window either way
    if sliding and raw.get("sliding_window_non_causal", kind == "dflash2"):
        made["is_causal"] = False
    return made


def own_tensors(
    tensors: Mapping[str, torch.Tensor], embedding: torch.Tensor, head: torch.Tensor, where: str
) -> dict[str, torch.Tensor]:
    """Without those of the target, which must be this one's. embedding, head: [V, H]."""
    for name, expected in ((EMBEDDING, embedding), (HEAD, head)):
        found = tensors.get(name)
        if found is not None and (found.shape != expected.shape or not _same(found, expected)):
            raise DraftsmithError(f"drafter {where}: its {name} is not the target's: it was made for another target")
    return {name: tensor for name, tensor in tensors.items() if own_name(name) is not None}


def own_name(name: str) -> str | None:
    """Of a tensor in a file; None of one of the target."""
    return None if name in OF_THE_TARGET else name


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """In the coarser of both dtypes."""
    dtype = min((found.dtype, expected.dtype), key=lambda dtype: dtype.itemsize)
    return torch.equal(found.to(dtype), expected.detach().to(found.device).to(dtype))
