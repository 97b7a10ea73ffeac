"""Body of stage `target`: finds the model's folder or dequantises a GGUF file, and writes `target.json`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from draftsmith.artifacts.atomic import TMP_PREFIX, fsync, write_text
from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.checksums import Checksums
from draftsmith.artifacts.store.manifest import ELSEWHERE
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.targets.config import Dtype, TargetConfig, gguf_file, model_folder, source_files, source_kind
from draftsmith.stages.targets.describe import describe, read_config
from draftsmith.stages.targets.hub import check_snapshot, hub_snapshot
from draftsmith.stages.targets.info import TargetInfo, write_target_info
from draftsmith.stages.targets.loading import load_weights


def run(ctx: StageContext, config: TargetConfig) -> None:
    """Write `target.json` and `origin.json`, and for a GGUF source the dequantised model to `model/`."""
    info = resolve_target(config, ctx.out, ctx.log, Checksums(home()).sha256)
    ctx.log(
        f"target {info.source}: {info.architecture}, {info.num_layers} layers, hidden {info.hidden_size}, "
        f"vocabulary {info.vocab_size}, {info.dtype}"
        + ("" if info.quantisation is None else f", loaded from {info.quantisation} weights")
        + ("" if info.rewindable else "; recurrent layers: the committed tokens of a verify step are read twice")
        + ("" if info.chat_template else "; no chat template, prompts will be plain text")
    )
    ctx.summary(
        layers=info.num_layers,
        hidden_size=info.hidden_size,
        vocab_size=info.vocab_size,
        max_positions=info.max_positions,
    )


def resolve_target(
    config: TargetConfig,
    out: Path,
    log: Callable[[str], None],
    checksum: Callable[[Path], str] | None = None,
) -> TargetInfo:
    """Find the model (hub, folder) or dequantise it to `out/model` (GGUF), and write `out/target.json`.

    checksum: returns a file's checksum; if given, `out/elsewhere.json` lists the files of a model outside the artifact.
    """
    kind = source_kind(config.source)
    revision = None
    if kind == "hub":
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        ignored = ["consolidated*", "original/*", "onnx/*"]
        folder = hub_snapshot("target.source", config.source, config.revision, patterns, ignored)
        revision = folder.name  # the commit
        if config.revision is None:
            log(f"target.revision is not set: using {revision} until the node target is forced")
        location = os.fspath(folder)
    elif kind == "folder":
        folder = model_folder(config.source)
        location = os.fspath(folder)
    else:
        folder, location = out / "model", "model"
        dequantise(gguf_file(config.source), folder, config.dtype, log)
    files = source_files(location) if kind in ("hub", "folder") else []
    before = [_file_state(path) for path in files]
    info = describe(folder, config, kind=kind, location=location, revision=revision)
    if files and checksum is not None:
        if kind == "hub":
            check_snapshot(folder, checksum)
        write_text(out / ELSEWHERE, json.dumps({os.fspath(path): checksum(path) for path in files}, indent=2) + "\n")
    if [_file_state(path) for path in files] != before:
        raise DraftsmithError(f"{folder}: the model changed while it was read. Run the same command again.")
    write_target_info(info, out)
    positions = read_config(folder)[1].get_text_config().max_position_embeddings
    if info.max_positions < positions:
        log(
            f"Limiting prompt and answer to {info.max_positions} of {positions} positions. Beyond "
            f"{info.max_positions} every token's rotary angles (longrope) or scales (Llama 4) depend on the text's "
            "length."
        )
    return info


def _file_state(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_ctime_ns


def extract_metadata(source: Path, folder: Path) -> None:
    """Write a GGUF file's config and tokenizer to a folder. Raises DraftsmithError if transformers cannot read it."""
    try:
        parts: list[Any] = [
            kind.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
            for kind in (AutoConfig, AutoTokenizer)
        ]
    except Exception as error:  # errors of gguf, transformers and tokenizers
        raise _unreadable(source, error) from error
    for part in parts:
        part.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if "architectures" not in config:  # a GGUF file names only the model type
        config["architectures"] = [CAUSAL.get(config["model_type"], "")]
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def dequantise(source: Path, folder: Path, dtype: Dtype, log: Callable[[str], None]) -> None:
    """Write a GGUF file's model, tokenizer and chat template as an ordinary folder in `dtype`.

    The folder appears when it is complete; one that an earlier attempt has completed is reused.
    """
    if folder.is_dir():
        log(f"{source.name} was dequantised by an earlier attempt")
        return
    parameters = count_parameters(source)
    torch_dtype = getattr(torch, dtype)
    partial = folder.with_name(f"{TMP_PREFIX}{folder.name}")  # never part of an artifact
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted attempt
    partial.mkdir(parents=True)
    needed, free = parameters * torch_dtype.itemsize, shutil.disk_usage(partial).free
    if needed > free:
        raise DraftsmithError(
            f"dequantising {source.name} needs {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free. "
            "Free some space or set DRAFTSMITH_HOME to another disk."
        )
    log(f"dequantising {source.name} ({parameters / 1e6:.0f}M parameters) to {dtype}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        model = load_weights(
            AutoModelForCausalLM,
            source.parent,
            source,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),  # otherwise the result cannot be saved
            dtype=torch_dtype,
        )
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise _unreadable(source, error) from error
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for path in partial.iterdir():
        fsync(path)
    partial.rename(folder)


def count_parameters(path: Path) -> int:
    """Return the number of weights in a GGUF file. Raises DraftsmithError if the file is damaged or cut off."""
    from gguf import GGUFReader  # GPU machines without a package index lack it

    advice = "Copy or download the file again."
    try:
        reader = GGUFReader(os.fspath(path))  # memory-mapped: reads the header, and views every tensor
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise DraftsmithError(f"{path}: not a GGUF file, or cut off ({one_line(error, 200)}). {advice}") from error
    if not reader.tensors:
        raise DraftsmithError(f"{path}: holds no tensors. {advice}")
    end = max(int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors)
    if end > path.stat().st_size:
        raise DraftsmithError(f"{path}: cut off, {path.stat().st_size} bytes where its header says {end}. {advice}")
    return sum(int(tensor.n_elements) for tensor in reader.tensors)


def _unreadable(source: Path, error: Exception) -> DraftsmithError:
    return DraftsmithError(
        f"{source}: transformers cannot read this GGUF model ({one_line(error)}). Use the model's folder instead."
    )
