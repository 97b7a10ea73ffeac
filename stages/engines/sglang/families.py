"""The targets that SGLang drafts for: its class of the model must hand over the hidden states of chosen layers.

Source: SGLang 0.5.20 and 0.5.23, the classes with `set_dflash_layers_to_capture` (DFLASH and DSPARK) and
`set_eagle3_layers_to_capture`; held against the registry of either by `make test-sglang`.
"""

from __future__ import annotations

from draftsmith.stages.drafters.kinds import KINDS

FIRST, LATER = "0.5.20", "0.5.23"  # the releases that were asked

_BOTH = {
    *("Cosmos3ForConditionalGeneration", "DeepseekV2ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM"),
    *("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
    *("Glm4MoeLiteForCausalLM", "Glm5NextForConditionalGeneration", "GlmMoeDsaForCausalLM", "GptOssForCausalLM"),
    *("IQuestCoderForCausalLM", "InternLM3ForCausalLM", "InternS1ProForConditionalGeneration"),
    *("KimiK25ForConditionalGeneration", "Llama4ForCausalLM", "LlamaForCausalLM", "MellumForCausalLM"),
    *("Ministral3ForCausalLM", "MistralForCausalLM", "MistralLarge3ForCausalLM", "Phi3ForCausalLM"),
    *("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "Qwen3VLForConditionalGeneration"),
    *("Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration", "TeleFLMForCausalLM"),
    "Qwen3_5MoeForConditionalGeneration",
}
BLOCKS = _BOTH | {
    *("LagunaForCausalLM", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM"),
    *("MuseGlimmerForCausalLM", "MuseGlimmerForConditionalGeneration", "NanbeigeForCausalLM"),
    *("NemotronHForCausalLM", "NemotronHPuzzleForCausalLM", "NemotronH_Nano_Omni_Reasoning_V3"),
    *("NemotronH_Nano_VL_V2", "NemotronH_Omni_Reasoning_V3", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"),
}
CHAINS = _BOTH | {
    *("ApertusForCausalLM", "BailingMoEForCausalLM", "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM"),
    *("ExaoneMoEForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Glm4MoeForCausalLM"),
    *("Llama4ForConditionalGeneration", "LongcatFlashForCausalLM", "MindSporeForCausalLM", "MiniMaxM2ForCausalLM"),
    *("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration", "Qwen2ForCausalLM"),
    *("Qwen2MoeForCausalLM", "Qwen2_5_VLForConditionalGeneration", "SarvamMoEForCausalLM"),
}
LATER_BLOCKS = {
    *("BeamForCausalLM", "KimiK3ForConditionalGeneration", "KimiK3LinearForCausalLM", "Lfm2VlForConditionalGeneration"),
    *("MiniMaxM3SparseForConditionalGeneration", "MuseSparkForConditionalGeneration"),
}
LATER_CHAINS = {"ExaoneMoeForCausalLM"}


def undrafted(architecture: str, kind: str) -> str | None:
    """Why SGLang does not draft for a target of this architecture with a drafter of this kind; None where it does."""
    chains = KINDS[kind].TRAITS.chains
    if architecture in (CHAINS if chains else BLOCKS):
        return None
    if architecture in (LATER_CHAINS if chains else LATER_BLOCKS):
        return f"SGLang {FIRST} has no {kind} for {architecture}, {LATER} has"
    others = [other for other, known in KINDS.items() if known.TRAITS.chains] if not chains else []
    there = f", but {' or '.join(others)}" if others and architecture in CHAINS else ""
    return f"SGLang {FIRST} and {LATER} have no {kind} for {architecture}{there}"
