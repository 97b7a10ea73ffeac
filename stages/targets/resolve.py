"""From a target's source to a folder that transformers loads, and `target.json`, which says what it is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, disk_error_of
from draftsmith.stages.targets.config import Dtype, TargetConfig
from draftsmith.stages.targets.source import (
    TOKENIZER_FILES,
    TOKENIZER_PARTS,
    Kind,
    check_safetensors,
    count_gguf_parameters,
    gguf_file,
    model_folder,
    source_kind,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INFO_FILE = "target.json"
# Where the model is and came from: no part of the artifact's content, so that a model that moves makes nothing anew.
ORIGIN_FILE = "origin.json"
_ORIGIN = {"source", "kind", "location", "revision"}
DRAFTERS = ("DFlashDraftModel", "LlamaForCausalLMEagle3")
# Fields of config.json that say where a copy came from, not what it computes.
_PROVENANCE = ("transformers_version", "_name_or_path", "_model_name_or_path")


class TargetInfo(BaseModel):
    """What the other stages need to know of the target without loading it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    source: str
    kind: Kind
    location: str  # "model" inside the artifact, or an absolute path
    revision: str | None  # the hub's commit
    dtype: Dtype  # serving dtype
    digest: str  # sha256 over config and weights: what a drafter is made for
    tokenizer_digest: str  # sha256 over tokenizer, chat template and generation config
    architecture: str
    model_type: str
    vocab_size: int  # rows of the embedding; may exceed the tokenizer's size
    hidden_size: int
    num_layers: int
    max_positions: int
    eos_ids: list[int]  # every id that ends an answer, the generation config's first
    mask_candidates: list[int]  # ids that no text uses, best first: for the drafter's mask token
    chat_template: bool
    tied_embeddings: bool


def read_target_info(folder: Path) -> TargetInfo:
    """The `target.json` and `origin.json` of a complete target artifact."""
    files = f"{folder / INFO_FILE}, {ORIGIN_FILE}"
    try:
        parts = [dict(json.loads((folder / name).read_text(encoding="utf-8"))) for name in (INFO_FILE, ORIGIN_FILE)]
        return TargetInfo.model_validate(parts[0] | parts[1])
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise DraftsmithError(f"{folder} has no {missing}: give the folder of a target artifact") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DraftsmithError(f"{files}: {field} {first['msg']}: run the target stage again with --force") from error
    except (ValueError, TypeError) as error:
        raise DraftsmithError(f"{files}: not JSON objects: run the target stage again with --force") from error


def write_target_info(info: TargetInfo, out: Path) -> None:
    """Write `target.json`, last, and `origin.json`."""
    for name, text in (
        (ORIGIN_FILE, info.model_dump_json(indent=2, include=_ORIGIN)),
        (INFO_FILE, info.model_dump_json(indent=2, exclude=_ORIGIN)),
    ):
        partial = out / f".{name}"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(out / name)


def model_path(folder: Path) -> Path:
    """The folder that transformers loads, for a complete target artifact. Raises if a linked model has gone."""
    path = folder / read_target_info(folder).location  # an absolute location replaces the folder
    if not (path / "config.json").is_file():
        raise DraftsmithError(f"{path}: the target's model is gone: put it back, or run the target stage with --force")
    return path


def resolve_target(config: TargetConfig, out: Path, log: Callable[[str], None]) -> TargetInfo:
    """Find (hub, folder) or make (GGUF) the model and write `out/target.json`; a made one stands in `out/model`."""
    kind = source_kind(config.source)
    revision = None
    if kind == "hub":
        folder, revision = _download(config)
        if config.revision is None:
            log(f"target.revision is not set: using {revision} until the node target is forced")
        location = os.fspath(folder)
    elif kind == "folder":
        if config.revision is not None:
            raise DraftsmithError("target.revision is for models of the hub: leave it out for a folder")
        folder = model_folder(config.source)
        location = os.fspath(folder)
    else:
        folder, location = out / "model", "model"
        _dequantise(gguf_file(config.source), folder, config.dtype, log)
    info = describe(folder, config, kind=kind, location=location, revision=revision)
    write_target_info(info, out)
    return info


def _download(config: TargetConfig) -> tuple[Path, str]:
    """The hub's snapshot in its own cache, and its commit; needs no network when the cache has it."""
    from huggingface_hub import constants, snapshot_download

    try:
        path = Path(
            snapshot_download(
                config.source,
                revision=config.revision,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"],
                ignore_patterns=["consolidated*", "original/*", "onnx/*"],
            )
        )
    except Exception as error:  # the hub's library raises its HTTP client's own errors too
        if disk_error_of(error) is not None:
            raise
        kind = DraftsmithError if hub_answered(error) or constants.HF_HUB_OFFLINE else RetryableError
        raise kind(f"target.source {config.source}: {hub_reason(error, config.revision)}") from error
    return path, path.name


def hub_answered(error: Exception) -> bool:
    """Whether the hub said no (or the id was wrong); else it could not be asked, and may be later."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not isinstance(error, HfHubHTTPError) or isinstance(error, LocalEntryNotFoundError):
        return isinstance(error, HFValidationError)
    status = getattr(error.response, "status_code", None)
    return status is None or (status < 500 and status != 429)  # else it is busy or ill


def hub_reason(error: Exception, revision: str | None) -> str:
    """What went wrong with the hub and what to do, to follow the name of the field. revision: that was asked for."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too: must come first
        return "access is restricted: accept its terms on the hub and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "no such folder here and no such model on the hub: check the name, or set HF_TOKEN if it is private"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no revision {revision}: correct it"
    if isinstance(error, HFValidationError):
        return "neither an existing folder nor a hub id: check the name"
    if not hub_answered(error):
        return (
            f"not a folder here, not in the hub's cache, and no network to the hub ({_one_line(error)[:99]}): connect, "
            "or give a local folder"
        )
    return f"the hub answered: {_one_line(error)}: try again, or give a local folder"


def _dequantise(source: Path, folder: Path, dtype: Dtype, log: Callable[[str], None]) -> None:
    """Write the GGUF file's model, tokenizer and chat template as an ordinary folder in `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    parameters = count_gguf_parameters(source)
    torch_dtype = getattr(torch, dtype)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted attempt left
    folder.mkdir(parents=True)
    needed, free = parameters * torch_dtype.itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise DraftsmithError(
            f"dequantising {source.name} needs {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: "
            "free some space or point DRAFTSMITH_HOME elsewhere"
        )
    log(f"dequantising {source.name} ({parameters / 1e6:.0f}M parameters) to {dtype}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),  # or the result cannot be saved
            dtype=torch_dtype,
            local_files_only=True,
        )
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise DraftsmithError(
            f"{source}: transformers cannot read this GGUF model ({_one_line(error)}): give the model's folder instead"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def describe(folder: Path, config: TargetConfig, *, kind: Kind, location: str, revision: str | None) -> TargetInfo:
    """Check a model folder (whole weights, causal LM, tokenizer) and say what it is; no weights are loaded."""
    _read_config(folder)  # before the weights: says what a folder without a causal LM is
    weights = weight_files(folder)
    for path in weights:
        check_safetensors(path)
    info = describe_metadata(folder, config, kind=kind, location=location, revision=revision)
    return info.model_copy(update={"digest": model_digest(folder, weights)})


def describe_metadata(
    folder: Path, config: TargetConfig, *, kind: Kind, location: str, revision: str | None
) -> TargetInfo:
    """The same from config and tokenizer alone; the digest, which is over the weights too, is left empty."""
    architecture, settings = _read_config(folder)
    tokenizer = load_tokenizer(folder)
    text = settings.get_text_config()
    _check_supported(folder, text)
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
        max_positions=text.max_position_embeddings,
        eos_ids=eos_ids,
        mask_candidates=_mask_candidates(tokenizer, text.vocab_size, eos_ids),
        chat_template=bool(tokenizer.chat_template),
        tied_embeddings=bool(text.tie_word_embeddings),
    )


def _read_config(folder: Path) -> tuple[str, PretrainedConfig]:
    """The architecture's name and transformers' config object of a causal LM."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DraftsmithError(f"{folder} has no config.json: give the folder of a whole model") from None
    except ValueError as error:
        raise DraftsmithError(f"{path}: not JSON ({error}): copy or download the model again") from error
    if not isinstance(raw, dict):
        raise DraftsmithError(f"{path}: not a JSON object: copy or download the model again")
    model_type = raw.get("model_type")
    architecture = (raw.get("architectures") or [CAUSAL.get(model_type, "")])[0]
    if architecture in DRAFTERS:
        raise DraftsmithError(
            f"{folder} is a drafter ({architecture}): target.source wants the model that it drafts for"
        )
    known = {name for entry in CAUSAL.values() for name in ([entry] if isinstance(entry, str) else entry)}
    if architecture not in known:
        what = architecture or f"model_type {model_type}"
        advice = "models that bring their own code are not run" if "auto_map" in raw else "give a causal language model"
        raise DraftsmithError(f"{folder}: {what} is not a causal language model that transformers knows: {advice}")
    try:
        return architecture, AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # configs check themselves with error classes of their own
        raise DraftsmithError(f"{path}: transformers cannot read it ({_one_line(error)}): correct it") from error


_TAKEN_OVER = ("hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
_NEUTRAL = {  # fields that change logits or attention in ways that the engine and the drafters do not compute
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
}


def _check_supported(folder: Path, text: PretrainedConfig) -> None:
    """Refuse a model whose answers would come out silently wrong: no full attention, or no plain linear head."""
    if missing := [name for name in _TAKEN_OVER if getattr(text, name, None) is None]:
        raise DraftsmithError(
            f"{folder}: {text.model_type} has no config field {missing[0]}: a drafter takes its shape over from a "
            "Llama-like target (grouped heads, RMSNorm); give another target"
        )
    for name, neutral in _NEUTRAL.items():
        if getattr(text, name, None) not in (None, neutral):
            raise DraftsmithError(
                f"{folder}: config field {name} = {getattr(text, name)} is not supported (the logits must be a plain "
                "linear map, the attention plain): give another target"
            )
    kinds = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None) if not kinds and getattr(text, "use_sliding_window", True) else None
    if (other := kinds - {"full_attention"}) or window:
        raise DraftsmithError(
            f"{folder}: {', '.join(sorted(other)) or f'sliding_window = {window}'} is not supported, every layer must "
            "attend to the whole prefix: give another target"
        )


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
        raise DraftsmithError(f"{folder}: the tokenizer cannot be read ({_one_line(error)}): copy it again") from error


def _eos_ids(folder: Path, text: PretrainedConfig, tokenizer: Any) -> list[int]:
    """Ids that end an answer: of generation config, config and tokenizer, as serving engines take them."""
    found: list[int] = []
    path = folder / "generation_config.json"
    try:
        generation = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise DraftsmithError(f"{path}: not a JSON object ({_one_line(error)}): copy it again") from error
    for value in (generation.get("eos_token_id"), text.eos_token_id, tokenizer.eos_token_id):
        found += value if isinstance(value, list) else [value] if value is not None else []
    return list(dict.fromkeys(found))


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


def model_digest(folder: Path, weights: list[Path]) -> str:
    """sha256 over the config (without provenance) and the bytes of the weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in _PROVENANCE:
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weights:
        digest.update(f"\0{path.name}\0".encode())
        _update(digest, path)
    return digest.hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """sha256 over the files that decide token ids, prompts and where answers end."""
    digest = hashlib.sha256()
    for name in sorted(TOKENIZER_PARTS):
        if (folder / name).is_file():
            digest.update(f"\0{name}\0".encode())
            _update(digest, folder / name)
    return digest.hexdigest()


def _update(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
