"""Describes a model folder: checks config, weights and tokenizer, and returns the target's `TargetInfo`.

Logit map and embedding scale are probed in the model, since config fields do not tell them: the same field multiplies
in one family and divides in another.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WITH_IMAGES
from transformers.quantizers import AutoHfQuantizer

from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.stages.targets.config import Kind, TargetConfig, check_weights
from draftsmith.stages.targets.info import LogitMap, TargetInfo, load_tokenizer, model_digest, tokenizer_digest
from draftsmith.stages.targets.layers import Layers, UnknownLayersError, stable_positions, usual_layer, wrong_numbers
from draftsmith.stages.targets.model_parts import causal_lm_of, decoder_of, model_class

_DRAFTER = re.compile("eagle|medusa|dflash|dspark")  # in names of drafters' classes
_WHOLE_MODEL = ("ForCausalLM", "ForConditionalGeneration")  # ends of names of whole models' classes
_SIZES = ("vocab_size", "num_hidden_layers")
_SIZES_OF_DRAFTER = ("hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")


def describe(folder: Path, config: TargetConfig, *, kind: Kind, location: str, revision: str | None) -> TargetInfo:
    """Check a model folder (causal LM, complete weights, tokenizer) and describe it; no weights are loaded."""
    read_config(folder)  # before the weights: a folder without a causal LM gets that error
    weights = check_weights(folder)
    info = describe_metadata(folder, config, kind=kind, location=location, revision=revision)
    return info.model_copy(update={"digest": model_digest(folder, weights)})


def describe_metadata(
    folder: Path, config: TargetConfig, *, kind: Kind, location: str, revision: str | None
) -> TargetInfo:
    """Describe a model folder from only its config and tokenizer; the digest of the weights stays empty."""
    if kind == "folder" and config.revision is not None:
        raise DraftsmithError("target.revision: is for models of the hub. Remove it for a folder.")
    architecture, settings = read_config(folder)
    tokenizer = load_tokenizer(folder)
    text = settings.get_text_config()
    layers, logits = _capabilities(folder, settings)
    if len(tokenizer) > text.vocab_size:
        raise DraftsmithError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model's vocabulary {text.vocab_size}: "
            "they do not belong together. Copy or download the model again."
        )
    eos_ids = _eos_ids(folder, text, tokenizer)
    if not eos_ids:
        raise DraftsmithError(
            f"{folder}: neither generation_config.json nor config.json nor the tokenizer names an end token. "
            "Set eos_token_id in generation_config.json."
        )
    return TargetInfo(
        source=config.source,
        kind=kind,
        location=location,
        revision=revision,
        dtype=config.dtype,
        digest="",
        tokenizer_digest=tokenizer_digest(folder),
        architecture=architecture,
        model_type=settings.model_type,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        max_positions=min(text.max_position_embeddings, stable_positions(text) or text.max_position_embeddings),
        eos_ids=eos_ids,
        mask_candidates=_mask_candidates(tokenizer, text.vocab_size, eos_ids),
        chat_template=bool(tokenizer.chat_template),
        tied_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        layer_kinds=sorted(set(layers.kinds)),
        rewindable=not layers.recurrent,
        tree_forward=not layers.recurrent,
        logit_scale=logits.scale,
        logit_softcap=logits.softcap,
        quantisation=_quantisation(folder, settings),
    )


def read_config(folder: Path) -> tuple[str, PretrainedConfig]:
    """Return architecture and transformers' config of a causal LM. Raises DraftsmithError for any other model."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DraftsmithError(f"{folder} has no config.json. Use the folder of a complete model.") from None
    except (ValueError, RecursionError) as error:
        raise DraftsmithError(f"{path}: not JSON ({error}). Copy or download the model again.") from error
    if not isinstance(raw, dict):
        raise DraftsmithError(f"{path}: not a JSON object. Copy or download the model again.")
    model_type, named = str(raw.get("model_type")), raw.get("architectures")
    first = named[0] if isinstance(named, list) and named else CAUSAL.get(model_type, "")
    architecture = first if isinstance(first, str) else ""
    entries = [*CAUSAL.values(), *WITH_IMAGES.values()]  # only the text part of the latter is used
    known = {_normalise(name) for entry in entries for name in ([entry] if isinstance(entry, str) else entry)}
    known.add(_normalise("MiMoForCausalLM"))  # a Qwen2 (`targets/layers.py`)
    # A name that transformers does not know means the model of the config's type if it ends like a whole model's name.
    # Other names are of drafters, classifiers, …
    drafter = bool(_DRAFTER.search(_normalise(architecture)))
    other = drafter or "auto_map" in raw or hasattr(transformers, architecture)
    other = other or not architecture.endswith(_WHOLE_MODEL)
    if _normalise(architecture) not in known and (other or model_type not in {*CAUSAL, *WITH_IMAGES}):
        what = architecture or f"model_type {model_type}"
        not_run = ", and code that comes with a model is not run" if "auto_map" in raw else ""
        raise DraftsmithError(
            f"{folder}: {what} is not a causal language model that transformers knows{not_run}. Use a causal "
            "language model; for a drafter, target.source is the model that it drafts for."
        )
    try:
        return architecture, AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # configs check themselves, and raise their own error classes
        raise DraftsmithError(f"{path}: transformers cannot read it ({one_line(error)}). Correct it.") from error


def _normalise(name: str) -> str:
    """Return a class name in one spelling: repositories write some with underscores or other capitals."""
    return name.replace("_", "").lower()


def _capabilities(folder: Path, config: PretrainedConfig) -> tuple[Layers, LogitMap]:
    """Return the model's layers and logit map. Raises DraftsmithError for a model whose answers would be wrong."""
    text = config.get_text_config()
    usual = usual_layer(text)
    if missing := [name for name in _SIZES_OF_DRAFTER if getattr(usual, name, None) is None]:
        raise DraftsmithError(
            f"{folder}: {text.model_type} has no config field {missing[0]}, which a drafter takes from a target with "
            "grouped heads. Choose another target."
        )
    if wrong := wrong_numbers(text, _SIZES) + wrong_numbers(usual, _SIZES_OF_DRAFTER):
        raise DraftsmithError(f"{folder / 'config.json'}: {wrong[0][0]} is {wrong[0][1]!r}. Correct it.")
    try:
        return Layers.from_config(text), probe_logit_map(config)
    except UnknownLayersError as error:
        raise DraftsmithError(
            f"{folder}: layers of {text.model_type} with {error} are not supported. Choose another target."
        ) from error
    except UnsupportedHeadError as error:
        raise DraftsmithError(
            f"{folder}: the logits of {text.model_type} must be those of a linear head without bias, possibly scaled "
            f"or soft-capped ({one_line(error)}). Choose another target."
        ) from error
    except Exception as error:  # model classes raise errors of any kind
        raise DraftsmithError(
            f"{folder}: transformers cannot build a model from its config.json ({type(error).__name__}: "
            f"{one_line(error)}). Correct it, or install the transformers that it is for."
        ) from error


def _quantisation(folder: Path, config: PretrainedConfig) -> str | None:
    """Return the quantisation method of a checkpoint, None if it has none.

    Raises DraftsmithError if transformers cannot load it here, mostly for lack of a package.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment(device_map=None)
    except (ImportError, ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        raise DraftsmithError(
            f"{folder}: its quantised weights cannot be loaded here ({one_line(error)}). Install what is missing, or "
            "use the checkpoint that is not quantised."
        ) from error
    method = quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


def _eos_ids(folder: Path, text: PretrainedConfig, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer, from generation config, config and tokenizer, as serving engines do."""
    ids: list[int] = []
    path, generation = folder / "generation_config.json", {}
    if path.is_file():
        try:
            generation = json.loads(path.read_text(encoding="utf-8"))
            GenerationConfig.from_dict(generation)  # loading the model parses it too
        except Exception as error:  # transformers compares fields of any type
            raise DraftsmithError(f"{path}: cannot be read ({one_line(error)}). Copy it again.") from error
    from_config = getattr(text, "eos_token_id", None)  # text configs of some models have no such field
    for value in (generation.get("eos_token_id"), from_config, tokenizer.eos_token_id):
        ids += value if isinstance(value, list) else [value] if value is not None else []
    if wrong := [token for token in ids if type(token) is not int]:
        raise DraftsmithError(f"{folder}: eos_token_id {wrong[0]!r} is not a token id. Correct generation_config.json.")
    return list(dict.fromkeys(index for index in ids if 0 <= index < text.vocab_size))


def _mask_candidates(tokenizer: Any, vocab_size: int, eos_ids: list[int]) -> list[int]:
    """Return ids that never occur in text: the mask token, rows beyond the tokenizer, unused special tokens."""
    ids: list[int] = []
    if tokenizer.mask_token_id is not None:
        ids.append(tokenizer.mask_token_id)
    ids += list(range(len(tokenizer), min(vocab_size, len(tokenizer) + 8)))
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, *eos_ids}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    special = [
        (token.content, index)
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and index not in named and token.content not in template and index < vocab_size
    ]
    words = ("mask", "reserved", "unused", "empty")
    special.sort(key=lambda entry: not any(word in entry[0].lower() for word in words))  # stable: ids stay in order
    return list(dict.fromkeys(ids + [index for _, index in special]))


_PRODUCTS = (1e-3, 0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e6)  # outputs of a head, tried with both signs
_TOLERANCE = 1e-4  # relative, of a float32 logit
_DIGITS = 6  # significant digits of a scale or cap in a config


class UnsupportedHeadError(ValueError):
    """The logits are not a `LogitMap` of a linear head's outputs."""


def probe_logit_map(config: Any) -> LogitMap:
    """Return the logit map of a causal LM with this config; no weights are needed or allocated.

    Its decoder is replaced by fixed hidden states, and its head by the identity. Raises UnsupportedHeadError.
    """
    with torch.device("meta"):
        model = causal_lm_of(model_class(config).from_config(copy.deepcopy(config)))
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise UnsupportedHeadError(f"its head is {head}")
    products = torch.tensor([0.0, *_PRODUCTS, *(-x for x in _PRODUCTS)])
    identity = nn.Linear(len(products), len(products), bias=False)
    identity.weight.data = torch.eye(len(products))
    model.set_output_embeddings(identity)
    whole = model.base_model if model.base_model is not model else decoder_of(model)
    whole.forward = lambda *_args, **_kwargs: _Hidden(products[None, None])
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits[0, 0].float()
    except (RuntimeError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise UnsupportedHeadError(f"its logits need more than the last hidden states ({error})") from error
    return _fit(products, logits)


def _fit(products: torch.Tensor, logits: torch.Tensor) -> LogitMap:
    by_product = dict(zip(products.tolist(), logits.tolist(), strict=False))
    small, large = (products[i].item() for i in (1, len(_PRODUCTS)))
    scale = _rounded(by_product[small] / small)
    capped = abs(by_product[large]) < 0.5 * abs(scale * large)
    logit_map = LogitMap(scale, _rounded(by_product[large]) if capped else None)
    if logits.shape != products.shape or not torch.allclose(logit_map(products), logits, rtol=_TOLERANCE, atol=1e-6):
        raise UnsupportedHeadError(f"it makes {by_product[3.0]:.6g} of 3, and {by_product[30.0]:.6g} of 30")
    return logit_map


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


class _Hidden(SimpleNamespace):
    """A decoder's output with only the last hidden states."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__(last_hidden_state=hidden)

    def __getattr__(self, _name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Any:
        return (self.last_hidden_state,)[index]


def embedding_scale(embedding: nn.Module) -> float:
    """Return the factor of an embedding module's rows, 1 for most models, found by embedding a row of a single 1.

    It is the exact number, not rounded to the module's dtype, since engines multiply by the exact one.
    """
    module = copy.copy(embedding)
    module.__dict__["_parameters"] = {"weight": nn.Parameter(torch.ones(1, 1), requires_grad=False)}
    module.__dict__["_buffers"] = {name: buffer.cpu() for name, buffer in embedding.named_buffers(recurse=False)}
    module.__dict__["padding_idx"] = None
    return float(module(torch.zeros(1, dtype=torch.long)))
