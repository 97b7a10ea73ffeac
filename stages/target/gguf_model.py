"""Reads a GGUF file through transformers: its config and tokenizer alone, or the whole model dequantised."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from draftsmith.artifacts.atomic import TMP_PREFIX, fsync
from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.stages.target.config import Dtype
from draftsmith.stages.target.loading import load_weights


def extract_metadata(source: Path, folder: Path) -> None:
    """Write config and tokenizer of a GGUF file to a folder. Raises DraftsmithError if transformers cannot read it."""
    try:
        parts: list[Any] = [
            kind.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
            for kind in (AutoConfig, AutoTokenizer)
        ]
    except Exception as error:  # of gguf, transformers and tokenizers
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
        f"{source}: transformers cannot read this GGUF model ({one_line(error)}). Give the model's folder instead."
    )
