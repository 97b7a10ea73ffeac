"""Body of stage `target`: finds the model's folder or dequantises a GGUF file, and writes `target.json`."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.checksums import Checksums
from draftsmith.artifacts.store.manifest import ELSEWHERE
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.target.config import TargetConfig
from draftsmith.stages.target.describe import describe, read_config
from draftsmith.stages.target.hub import check_snapshot, hub_snapshot
from draftsmith.stages.target.info import ADAPTERS, TargetInfo, write_target_info
from draftsmith.stages.target.source import adapter_files, gguf_file, model_folder, source_files, source_kind


def run(ctx: StageContext, config: TargetConfig) -> None:
    """Write `target.json` and `origin.json`, and for a GGUF source the dequantised model to `model/`."""
    info = resolve_target(config, ctx.out, ctx.log, Checksums(home()).sha256)
    ctx.log(
        f"target {info.source}: {info.architecture}, {info.num_layers} layers, hidden {info.hidden_size}, "
        f"vocabulary {info.vocab_size}, {info.dtype}"
        + ("" if info.quantisation is None else f", loaded from {info.quantisation} weights")
        + ("" if info.rewindable else "; recurrent layers: the committed tokens of a verify step are read twice")
        + (f"; adapters {', '.join(info.adapters)}" if info.adapters else "")
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

    checksum: of a file; if given, `out/elsewhere.json` lists the files of a model outside the artifact.
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
        from draftsmith.stages.target.gguf_model import dequantise  # GPU machines without a package index lack gguf

        folder, location = out / "model", "model"
        dequantise(gguf_file(config.source), folder, config.dtype, log)
    files = source_files(location) if kind in ("hub", "folder") else []
    adapters = {name: adapter_files(name, source) for name, source in config.adapters.items()}
    read = [*files, *itertools.chain(*adapters.values())]
    before = [_file_state(path) for path in read]
    info = describe(folder, config, kind=kind, location=location, revision=revision)
    if files and checksum is not None:
        if kind == "hub":
            check_snapshot(folder, checksum)
        write_text(out / ELSEWHERE, json.dumps({os.fspath(path): checksum(path) for path in files}, indent=2) + "\n")
    for name, paths in adapters.items():
        (out / ADAPTERS / name).mkdir(parents=True, exist_ok=True)
        for path in paths:
            shutil.copy(path, out / ADAPTERS / name)
    if [_file_state(path) for path in read] != before:
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
