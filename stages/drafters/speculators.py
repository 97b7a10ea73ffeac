"""Conversion from and to the layout of the speculators library, which vLLM loads: the same weights, another config.

It covers DFlash, DFlash2 and DSpark.

Source: github.com/vllm-project/speculators, 0.9.0 (`models/dflash/`, `models/dflash2/`, `models/dspark/`,
`convert/dflash/`). Layer ids there count the embedding as 0, so they are one higher than here. `block_size` counts a
block's queries: one per proposal if the anchor's query predicts offset 1, else one more. A checkpoint also holds the
target's embedding and head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.spec import RawConfig

KIND = "speculators_model_type"  # the field that identifies such a config
VERSION = "0.9.0"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
OF_THE_TARGET = (EMBEDDING, HEAD, "verifier_lm_head.weight", "verifier_norm.weight")
_KINDS = {"DFlashDraftModel": "dflash", "DFlash2DraftModel": "dflash2", "DSparkDraftModel": "dspark"}
_ALSO = {"Qwen3DSparkModel": "DSparkDraftModel"}  # SGLang's name
_SIZES = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
_UNARY = {"output_multiplier": 1, "final_logit_softcapping": 0}  # DFlash2 fields and the values that change nothing
_HEADS: RawConfig = {  # DSpark fields and the library's defaults
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


def to_speculators(raw: RawConfig, target: str, target_architectures: list[str]) -> RawConfig:
    """Convert the config.json of a checkpoint to that of speculators.

    target: where an engine finds the target. Raises DraftsmithError for a drafter that the library cannot represent.
    """
    architecture, dflash = raw["architectures"][0], raw.get("dflash_config", {})
    architecture = _ALSO.get(architecture, architecture)
    if architecture not in _KINDS:
        raise DraftsmithError(
            f"drafter: the speculators layout does not support {architecture}. Export it without --format."
        )
    kind, both_ways = _KINDS[architecture], _both_ways(raw)
    if kind == "dflash2" and not dflash.get("conv_kernel_size"):
        raise DraftsmithError(
            "drafter: it has no convolutions, and speculators requires them of a DFlash2. Export it without --format."
        )
    if mapped := [name for name, neutral in _UNARY.items() if (dflash.get(name) or neutral) != neutral]:
        raise DraftsmithError(
            f"drafter: dflash_config.{mapped[0]} is {dflash[mapped[0]]}, and speculators has no such field. Export it "
            "without --format."
        )
    kind_fields: RawConfig = {name: dflash[name] for name in _SIZES} if kind == "dflash2" else {}
    proposals, from_anchor = raw["block_size"] - 1, False
    if kind == "dspark":
        kind_fields = {name: raw[name] for name in _HEADS}
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
        **kind_fields,
    }


def _both_ways(raw: RawConfig) -> bool:
    """Return whether its layers read a block in both directions.

    Raises DraftsmithError if they differ, or if full layers do not. The library has a field for sliding layers only,
    and vLLM applies it to all layers (vllm-project/vllm#56692).
    """
    causal, layers = raw.get("is_causal"), set(raw.get("layer_types") or ())
    if causal:
        raise DraftsmithError(
            "drafter: is_causal is true, and speculators reads full layers in both directions. Serve it with SGLang."
        )
    if "sliding_attention" not in layers or causal is False:
        return True
    if "full_attention" in layers:
        raise DraftsmithError(
            "drafter: its sliding layers read a block only backwards and its full layers do not, and vLLM would make "
            "all layers alike. Serve it with SGLang, or train one whose layers are all of one kind."
        )
    return False


def from_speculators(raw: RawConfig, where: str) -> RawConfig:
    """Convert a config.json of speculators to ours. Raises DraftsmithError for fields that are not computed here."""
    kind, layers = raw[KIND], raw.get("transformer_layer_config")
    architecture = next((name for name, known in _KINDS.items() if known == kind), None)
    if not isinstance(layers, dict):
        raise DraftsmithError(
            f"drafter {where}: field transformer_layer_config is missing. Export the checkpoint again."
        )
    if architecture is None:
        raise DraftsmithError(f"drafter {where}: {KIND} is {kind!r}. Supported are {', '.join(_KINDS.values())}.")
    from_anchor = raw.get(_FROM_ANCHOR, kind == "dspark")
    for field, value, computed in (
        (_FROM_ANCHOR, from_anchor or False, from_anchor if kind == "dspark" else False),
        ("draft_vocab_size", raw.get("draft_vocab_size", layers.get("vocab_size")), layers.get("vocab_size")),
    ):
        if value != computed:
            raise DraftsmithError(
                f"drafter {where}: {field} is {value!r}, and only {computed!r} is computed here. Choose another "
                "drafter."
            )
    ids, block = raw.get("aux_hidden_state_layer_ids"), raw.get("block_size")
    if kind == "dspark" and isinstance(block, int) and not from_anchor:
        block -= 1  # here the block size of a DSpark counts proposals
    dflash = {
        "mask_token_id": raw.get("mask_token_id"),
        "target_layer_ids": None if ids is None else [layer - 1 for layer in ids],
        "block_size": block,
        **({name: raw.get(name) for name in _SIZES} if kind == "dflash2" else {}),
    }
    config = {**layers, "architectures": [architecture], "block_size": block, "dflash_config": dflash}
    if kind == "dspark":
        config |= {name: raw.get(name, default) for name, default in _HEADS.items()} | {_FROM_ANCHOR: from_anchor}
    sliding = "sliding_attention" in (layers.get("layer_types") or ())
    if sliding:
        config["use_sliding_window"] = True  # speculators reads sliding_window either way
    if sliding and raw.get("sliding_window_non_causal", kind == "dflash2"):
        config["is_causal"] = False
    return config


def own_tensors(
    tensors: Mapping[str, torch.Tensor], embedding: torch.Tensor, head: torch.Tensor, where: str
) -> dict[str, torch.Tensor]:
    """Return the tensors without the target's, which must equal this target's. embedding, head: [V, H]."""
    for name, expected in ((EMBEDDING, embedding), (HEAD, head)):
        stored = tensors.get(name)
        if stored is not None and (stored.shape != expected.shape or not _same(stored, expected)):
            raise DraftsmithError(f"drafter {where}: its {name} is not the target's. Choose a drafter of this target.")
    return {name: tensor for name, tensor in tensors.items() if own_name(name) is not None}


def own_name(name: str) -> str | None:
    """Return the name of a file's tensor in the model; None for the target's."""
    return None if name in OF_THE_TARGET else name


def _same(stored: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two tensors are equal in the coarser of both dtypes."""
    dtype = min((stored.dtype, expected.dtype), key=lambda dtype: dtype.itemsize)
    return torch.equal(stored.to(dtype), expected.detach().to(stored.device).to(dtype))
