"""From a target's source to a folder that transformers loads, and `target.json`, which says what it is."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.atomic import TMP_PREFIX, fsync, write_text
from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.artifacts.store.manifest import ELSEWHERE
from draftsmith.stages.target.config import Dtype, TargetConfig
from draftsmith.stages.target.hub import check_snapshot, hub_snapshot
from draftsmith.stages.target.info import TargetInfo, model_digest, tokenizer_digest, write_target_info
from draftsmith.stages.target.logit_map import LogitMap
from draftsmith.stages.target.model_sizes import usual_layer, wrong_numbers
from draftsmith.stages.target.source import (
    TOKENIZER_FILES,
    Kind,
    check_weights,
    count_gguf_parameters,
    gguf_file,
    model_folder,
    source_files,
    source_kind,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from draftsmith.stages.target.layers import Layers


def resolve_target(
    config: TargetConfig,
    out: Path,
    log: Callable[[str], None],
    checksum: Callable[[Path], str] | None = None,
) -> TargetInfo:
    """Find (hub, folder) or make (GGUF) the model and write `out/target.json`; a made one stands in `out/model`.

    checksum: of a file; where given, `out/elsewhere.json` names the files of a model that stays where it is.
    """
    kind = source_kind(config.source)
    revision = None
    if kind == "hub":
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        others = ["consolidated*", "original/*", "onnx/*"]
        folder = hub_snapshot("target.source", config.source, config.revision, patterns, others)
        revision = folder.name  # the commit
        if config.revision is None:
            log(f"target.revision is not set: using {revision} until the node target is forced")
        location = os.fspath(folder)
    elif kind == "folder":
        folder = model_folder(config.source)
        location = os.fspath(folder)
    else:
        folder, location = out / "model", "model"
        _dequantise(gguf_file(config.source), folder, config.dtype, log)
    files = source_files(location) if kind in ("hub", "folder") else []
    before = [_touched(path) for path in files]
    info = describe(folder, config, kind=kind, location=location, revision=revision)
    if files and checksum is not None:
        if kind == "hub":
            check_snapshot(folder, checksum)
        write_text(out / ELSEWHERE, json.dumps({os.fspath(path): checksum(path) for path in files}, indent=2) + "\n")
    if [_touched(path) for path in files] != before:
        raise DraftsmithError(f"{folder}: somebody writes to the model while it is read: run the same command again")
    write_target_info(info, out)
    whole = _read_config(folder)[1].get_text_config().max_position_embeddings
    if info.max_positions < whole:
        log(
            f"{info.max_positions} of {whole} positions are used: beyond, angles (longrope) or scales (Llama 4) of all "
            "of a text depend on how long it is, so prompts with their answers are kept within"
        )
    return info


def _touched(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_ctime_ns


def _dequantise(source: Path, folder: Path, dtype: Dtype, log: Callable[[str], None]) -> None:
    """Write the GGUF file's model, tokenizer and chat template as an ordinary folder in `dtype`.

    The folder is there when it is complete: what an earlier attempt has converted is kept.
    """
    if folder.is_dir():
        log(f"{source.name} was dequantised by an earlier attempt")
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from draftsmith.stages.target.loading import load_weights

    parameters = count_gguf_parameters(source)
    torch_dtype = getattr(torch, dtype)
    partial = folder.with_name(f"{TMP_PREFIX}{folder.name}")  # never part of an artifact
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted attempt left
    partial.mkdir(parents=True)
    needed, free = parameters * torch_dtype.itemsize, shutil.disk_usage(partial).free
    if needed > free:
        raise DraftsmithError(
            f"dequantising {source.name} needs {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: "
            "free some space or point DRAFTSMITH_HOME elsewhere"
        )
    log(f"dequantising {source.name} ({parameters / 1e6:.0f}M parameters) to {dtype}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        model = load_weights(
            AutoModelForCausalLM,
            source.parent,
            source,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),  # or the result cannot be saved
            dtype=torch_dtype,
        )
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise DraftsmithError(
            f"{source}: transformers cannot read this GGUF model ({one_line(error)}): give the model's folder instead"
        ) from error
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for path in partial.iterdir():
        fsync(path)
    partial.rename(folder)


def describe(folder: Path, config: TargetConfig, *, kind: Kind, location: str, revision: str | None) -> TargetInfo:
    """Check a model folder (whole weights, causal LM, tokenizer) and say what it is; no weights are loaded."""
    _read_config(folder)  # before the weights: says what a folder without a causal LM is
    weights = check_weights(folder)
    info = describe_metadata(folder, config, kind=kind, location=location, revision=revision)
    return info.model_copy(update={"digest": model_digest(folder, weights)})


def describe_metadata(
    folder: Path, config: TargetConfig, *, kind: Kind, location: str, revision: str | None
) -> TargetInfo:
    """The same from config and tokenizer alone; the digest, which is over the weights too, is left empty."""
    from draftsmith.stages.target.layers import steady_positions

    if kind == "folder" and config.revision is not None:
        raise DraftsmithError("target.revision is for models of the hub: leave it out for a folder")
    architecture, settings = _read_config(folder)
    tokenizer = load_tokenizer(folder)
    text = settings.get_text_config()
    layers, logits = _capabilities(folder, settings)
    if len(tokenizer) > text.vocab_size:
        raise DraftsmithError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model's vocabulary {text.vocab_size}: "
            "tokenizer and model do not belong together"
        )
    eos_ids = _eos_ids(folder, text, tokenizer)
    if not eos_ids:
        raise DraftsmithError(
            f"{folder}: neither generation_config.json nor config.json nor the tokenizer names an end token: "
            "set eos_token_id in generation_config.json"
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
        max_positions=min(text.max_position_embeddings, steady_positions(text) or text.max_position_embeddings),
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


def _read_config(folder: Path) -> tuple[str, PretrainedConfig]:
    """The architecture's name and transformers' config object of a causal LM."""
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WITH_IMAGES

    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DraftsmithError(f"{folder} has no config.json: give the folder of a whole model") from None
    except (ValueError, RecursionError) as error:
        raise DraftsmithError(f"{path}: not JSON ({error}): copy or download the model again") from error
    if not isinstance(raw, dict):
        raise DraftsmithError(f"{path}: not a JSON object: copy or download the model again")
    model_type, named = str(raw.get("model_type")), raw.get("architectures")
    first = named[0] if isinstance(named, list) and named else CAUSAL.get(model_type, "")
    architecture = first if isinstance(first, str) else ""
    entries = [*CAUSAL.values(), *WITH_IMAGES.values()]  # of the latter the text part is used
    known = {_plain(name) for entry in entries for name in ([entry] if isinstance(entry, str) else entry)}
    # a name of this kind that says nothing to transformers stands for what the config's type does; others are drafters,
    # classifiers, …
    drafts = bool(_DRAFTER.search(_plain(architecture)))
    other = drafts or "auto_map" in raw or hasattr(transformers, architecture) or not architecture.endswith(_WHOLE)
    if _plain(architecture) not in known and (other or model_type not in {*CAUSAL, *WITH_IMAGES}):
        what = architecture or f"model_type {model_type}"
        advice = "models that bring their own code are not run" if "auto_map" in raw else "give a causal language model"
        raise DraftsmithError(
            f"{folder}: {what} is not a causal language model that transformers knows: {advice}; if it is a drafter, "
            "target.source wants the model that it drafts for"
        )
    try:
        return architecture, AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # configs check themselves with error classes of their own
        raise DraftsmithError(f"{path}: transformers cannot read it ({one_line(error)}): correct it") from error


_DRAFTER = re.compile("eagle|medusa|dflash|dspark")  # by whatever class name
_WHOLE = ("ForCausalLM", "ForConditionalGeneration")  # what classes of whole models are called


def _plain(name: str) -> str:
    """Of a class: repositories write some otherwise than transformers, which loads them all the same."""
    return name.replace("_", "").lower()


_SIZES = ("vocab_size", "num_hidden_layers")
_TAKEN_OVER = ("hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")


def _capabilities(folder: Path, config: PretrainedConfig) -> tuple[Layers, LogitMap]:
    """What can be done with the model. Refused is one whose answers would come out silently wrong."""
    from draftsmith.stages.target.layers import Layers, UnknownLayersError
    from draftsmith.stages.target.logit_probe import OtherHeadError, ask_model

    text = config.get_text_config()
    usual = usual_layer(text)
    if missing := [name for name in _TAKEN_OVER if getattr(usual, name, None) is None]:
        raise DraftsmithError(
            f"{folder}: {text.model_type} has no config field {missing[0]}: a drafter takes its shape over from a "
            "target with grouped heads; give another target"
        )
    if wrong := wrong_numbers(text, _SIZES) + wrong_numbers(usual, _TAKEN_OVER):
        raise DraftsmithError(f"{folder / 'config.json'}: {wrong[0][0]} is {wrong[0][1]!r}: correct it")
    try:
        return Layers.of(text), ask_model(config)
    except UnknownLayersError as error:
        raise DraftsmithError(
            f"{folder}: layers of {text.model_type} with {error} are not supported; give another target"
        ) from error
    except OtherHeadError as error:
        raise DraftsmithError(
            f"{folder}: the logits of {text.model_type} are not those of a linear head, scaled or soft-capped "
            f"({one_line(error)}): give another target"
        ) from error
    except Exception as error:  # classes of models raise of every kind where they meet what is not theirs
        raise DraftsmithError(
            f"{folder}: transformers cannot make a model of its config.json ({type(error).__name__}: "
            f"{one_line(error)}): correct it, or install the transformers that it is for"
        ) from error


def _quantisation(folder: Path, config: PretrainedConfig) -> str | None:
    """The method of a checkpoint whose weights are quantised, by its name in config.json. transformers loads it, or
    says here what it lacks: a package, for most."""
    from transformers.quantizers import AutoHfQuantizer

    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        quantizer.validate_environment(device_map=None)
    except (ImportError, ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        raise DraftsmithError(
            f"{folder}: its quantised weights cannot be loaded here ({one_line(error)}): install what is missing, or "
            "give the checkpoint that is not quantised"
        ) from error
    method = quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; DraftsmithError if there is none or it cannot be read."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DraftsmithError(
            f"{folder}: no tokenizer ({TOKENIZER_FILES[0]} is missing): copy the model's tokenizer there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise DraftsmithError(f"{folder}: the tokenizer cannot be read ({one_line(error)}): copy it again") from error


def _eos_ids(folder: Path, text: PretrainedConfig, tokenizer: Any) -> list[int]:
    """Ids that end an answer: of generation config, config and tokenizer, as serving engines take them."""
    from transformers import GenerationConfig

    found: list[int] = []
    path, generation = folder / "generation_config.json", {}
    if path.is_file():
        try:
            generation = json.loads(path.read_text(encoding="utf-8"))
            GenerationConfig.from_dict(generation)  # which whoever loads the model reads too
        except Exception as error:  # transformers compares fields of any type
            raise DraftsmithError(f"{path}: cannot be read ({one_line(error)}): copy it again") from error
    of_config = getattr(text, "eos_token_id", None)  # text parts of some models have no such field
    for value in (generation.get("eos_token_id"), of_config, tokenizer.eos_token_id):
        found += value if isinstance(value, list) else [value] if value is not None else []
    if wrong := [each for each in found if type(each) is not int]:
        raise DraftsmithError(f"{folder}: eos_token_id {wrong[0]!r} is no token id: correct generation_config.json")
    return list(dict.fromkeys(index for index in found if 0 <= index < text.vocab_size))  # others end nothing


def _mask_candidates(tokenizer: Any, vocab_size: int, eos_ids: list[int]) -> list[int]:
    """Ids that never occur in text: a mask token, then rows beyond the tokenizer, then special tokens without a use."""
    found: list[int] = []
    if tokenizer.mask_token_id is not None:
        found.append(tokenizer.mask_token_id)
    found += list(range(len(tokenizer), min(vocab_size, len(tokenizer) + 8)))
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, *eos_ids}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    special = [
        (token.content, index)
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and index not in named and token.content not in template and index < vocab_size
    ]
    words = ("mask", "reserved", "unused", "empty")
    special.sort(key=lambda entry: not any(word in entry[0].lower() for word in words))  # stable: ids stay in order
    return list(dict.fromkeys(found + [index for _, index in special]))
