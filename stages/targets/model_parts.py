"""The parts of a loaded model: its causal LM, and the decoder in that, which computes hidden states."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def model_class(config: Any) -> Any:
    """Return transformers' auto class that loads a checkpoint's causal LM, or an image model that contains one."""
    known = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def causal_lm_of(model: Any) -> Any:
    """Return the causal LM of a model loaded by `model_class`: some contain one, and have no head themselves."""
    return model if model.get_output_embeddings() is not None else getattr(model, "language_model", model)


def decoder_of(model: Any) -> Any:
    """Return the part of a causal LM that computes hidden states of text."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder  # Llama 4's get_decoder returns the model itself
