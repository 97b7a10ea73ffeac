"""Does a server compute what the target computes: with its weights, its config and its number formats?"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.stages.engines.sglang import probe
from draftsmith.stages.engines.sglang.asking import json_object, send, wrong
from draftsmith.stages.engines.sglang.client import check_status

if TYPE_CHECKING:
    import httpx

    from draftsmith.stages.engines.sglang.expected import Expected

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAMES = {"half": "float16", "float": "float32", "bf16": "bfloat16"}  # SGLang's other ones


def check_settings(url: str, model: dict[str, Any], server: dict[str, Any], expected: Expected) -> list[str]:
    """Options that change what is computed from the right files. Random weights and another config are errors.

    Number formats are what a team may want to serve in: they are returned as a remark.
    """
    loaded = {
        "load-format": model.get("load_format") or server.get("load_format"),
        "speculative-draft-load-format": server.get("speculative_draft_load_format"),
    }
    for option, value in loaded.items():
        if value == "dummy":
            raise wrong(url, f"has random weights; start it without --{option} dummy")
    config = json.loads((expected.model_folder / "config.json").read_text(encoding="utf-8"))
    overrides = server.get("json_model_override_args") or {}
    overrides = json.loads(overrides) if isinstance(overrides, str) else overrides
    if others := [name for name, value in overrides.items() if name not in config or config[name] != value]:
        raise wrong(
            url,
            f"computes by another config than the target's ({', '.join(others)} of --json-model-override-args); start "
            "it without, or put them into the target's config.json",
        )
    target, formats = expected.target, []
    if (dtype := _dtype(server.get("dtype"), config)) not in (None, target.dtype):
        formats.append(f"dtype {dtype}")
    if (quantization := server.get("quantization")) and target.quantisation is None:
        formats.append(f"quantization {quantization}")
    cache = server.get("kv_cache_dtype") or "auto"
    if _NAMES.get(cache, cache) not in ("auto", target.dtype):
        formats.append(f"kv_cache_dtype {cache}")
    if not formats:
        return []
    return [f"{url} computes with {', '.join(formats)}, the target in {target.dtype}: answers may differ from its own"]


def _dtype(name: str | None, config: dict[str, Any]) -> str | None:
    """What an option of SGLang means: `auto` is the checkpoint's, but half precision for one in float32."""
    if name != "auto":
        return _NAMES.get(name, name) if name else None
    text = {**config.get("text_config", {}), **config}
    stored = text.get("dtype") or text.get("torch_dtype") or "float32"
    if stored != "float32":
        return str(stored)
    return "bfloat16" if str(config.get("model_type")).startswith("gemma") else "float16"


async def check_weights(
    client: httpx.AsyncClient,
    url: str,
    path: str,
    server: dict[str, Any],
    expected: Expected,
    log: Callable[[str], None],
    *,
    here: bool,
) -> list[str]:
    """Are they the target's? By the files where they lie here, else by the hub's commit, else by what it computes.

    here: whether the server is on this machine, and `path` its own folder. Returns what could not be checked.
    """
    target, folder = expected.target, Path(path)
    if here:
        from draftsmith.stages.engines.sglang.digests import served_model_digest

        if folder.resolve() == expected.model_folder.resolve():
            return []
        if (digest := await asyncio.to_thread(served_model_digest, folder)) is not None:
            if digest != target.digest:
                raise wrong(
                    url, f"serves {path}, whose config or weights differ from the target {expected.model_folder}"
                )
            return []
    revision = str(server.get("revision") or "")
    if path == target.source and _COMMIT.fullmatch(revision) and target.revision is not None:
        if revision != target.revision:
            raise wrong(
                url, f"serves {path} of revision {revision}, the target is revision {target.revision}; start it with "
                f"--revision {target.revision}, or set target.revision"
            )  # fmt: skip
        return []
    return await _check_logprobs(client, url, path, server, expected, log)


async def _check_logprobs(
    client: httpx.AsyncClient,
    url: str,
    path: str,
    server: dict[str, Any],
    expected: Expected,
    log: Callable[[str], None],
) -> list[str]:
    """Does it say of fixed tokens what the target says of them? Returns what could not be checked."""
    target, tokens = expected.target, expected.scored_ids
    if quantization := server.get("quantization"):
        return [f"{url} serves {path} quantised ({quantization}): its weights could not be compared with the target's"]
    response = await send(client, "POST", f"{url}/generate", probe.payload(tokens))
    check_status("of the handshake", url, response.status_code, response.text)
    theirs = probe.served_logprobs(json_object(response), tokens)
    if theirs is None:
        return [f"{url} gives no log-probs of a prompt: the weights of {path} could not be compared with the target's"]
    try:
        ours = await asyncio.to_thread(probe.own_logprobs, expected.target_folder, tokens, log)
    except probe.NoRoomError as error:
        return [
            f"{url} serves {path}: its weights could not be compared with the target's, {error}; start the server with "
            "--revision and its commit, which is compared instead"
        ]
    difference = probe.mean_difference(ours, theirs)
    allowed = probe.tolerance(target.dtype, server.get("dtype"))
    if difference > allowed:
        raise wrong(
            url,
            f"serves {path}, whose log-probs of {len(ours)} fixed tokens are {difference:.3g} nats from those of the "
            f"target {target.source} in the mean (rounding is at most {allowed:g}): other weights; serve revision "
            f"{target.revision or target.digest[:12]}",
        )
    return [f"{url} serves {path}: log-probs of {len(ours)} fixed tokens are {difference:.2g} nats from the target's"]
