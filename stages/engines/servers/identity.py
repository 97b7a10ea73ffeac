"""Checks that a server serves the target: its tokenizer, and its weights by its log-probs of fixed tokens.

The target scores these tokens here on the CPU. With the same weights the mean absolute difference of the log-probs is
only rounding. Where a server quantises the weights or the cache, or computes in another dtype, the difference is
recorded.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from draftsmith.artifacts.host import free_memory_bytes
from draftsmith.artifacts.results.evaluation import TargetDifference
from draftsmith.stages.engines.config import Options, option_name
from draftsmith.stages.engines.servers.http import json_object, query, wrong_server
from draftsmith.stages.engines.servers.requirements import PROBE_TEXT, ServerRequirements
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import TargetInfo, model_path, read_target_info
from draftsmith.stages.targets.loading import model_without_weights

TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}  # of the mean, nats; the coarser of both dtypes counts
# Of the mean, nats, for a server of unknown weights that quantises. 8 bits of weights, activations and cache moved
# SmolLM2-135M and a target of 0.82 million parameters by up to 0.21; another revision of the latter is 4.7 away
# (`python -m tests.benchmarks.handshake`).
QUANTISED_TOLERANCE = 0.3
_SAME = {"bf16": "bfloat16", "half": "float16", "float": "float32"}  # names of dtypes
_LOCK = threading.Lock()
_OWN_LOGPROBS: dict[tuple[Path | int, ...], list[float]] = {}  # by a target's folder and the tokens


class TargetTooLargeError(Exception):
    """The target does not fit into this machine's memory."""


async def check_tokenizer(client: httpx.AsyncClient, url: str, path: str, required: ServerRequirements) -> list[str]:
    """Compare a server's tokenizer with the target's. Returns the checks that were not possible."""
    response = await query(client, "POST", f"{url}/tokenize", {"prompt": PROBE_TEXT, "add_special_tokens": False})
    tokens = json_object(response).get("tokens") if response.status_code == 200 else None
    if tokens is None:
        return [f"{url} has no tokenizer endpoint: its vocabulary could not be compared"]
    if tokens != required.probe_ids:
        raise wrong_server(url, f"serves {path}, whose tokenizer is not that of the target {required.target.source}.")
    return []


@dataclass(frozen=True)
class ServedTarget:
    """A server's report of its target. None or "auto": not reported."""

    url: str
    path: str
    dtype: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    known: bool = False  # its weights are the target's: it was started here, or serves the target's commit

    def differs(self, target: TargetInfo) -> list[str]:
        """Return the settings that differ from transformers' computation."""
        expected = {"dtype": target.dtype, "quantization": target.quantisation, "kv_cache_dtype": target.dtype}
        reported = {name: _SAME.get(value, value) for name in expected if (value := getattr(self, name))}
        return [f"{name} {value}" for name, value in reported.items() if value not in ("auto", expected[name])]

    def tolerance(self, target: TargetInfo) -> float:
        """Return the tolerance of the mean difference, nats."""
        if any(not setting.startswith("dtype ") for setting in self.differs(target)):
            return QUANTISED_TOLERANCE
        return max(TOLERANCE[target.dtype], TOLERANCE.get(self.dtype or target.dtype, TOLERANCE["bfloat16"]))


def launched_target(options: Options, url: str = "", path: str = "") -> ServedTarget:
    """Return the target that a server started here serves, by its options."""
    values = {option_name(key): str(value) for key, value in options.items()}
    quantization = values.get("quantization") or values.get("torchao-config")
    return ServedTarget(url, path, None, quantization, values.get("kv-cache-dtype"), known=True)


async def check_weights(
    served: ServedTarget,
    scored: Callable[[], Awaitable[Sequence[float] | None]],
    required: ServerRequirements,
    log: Callable[[str], None],
) -> tuple[list[str], TargetDifference | None]:
    """Compare a server's log-probs of the fixed tokens with the target's; of known weights only if a setting differs.

    scored: returns the server's log-probs, None if it gives none.
    Returns a remark, and the difference if settings differ. Raises DraftsmithError for other weights.
    """
    target, tokens = required.target, required.scored_ids
    url, path, differs = served.url, served.path, served.differs(target)
    if served.known and not differs:
        return [], None
    unmeasured = TargetDifference(settings=differs) if differs else None
    if (theirs := await scored()) is None:
        remark = f"{url} gives no log-probs of a prompt: the weights of {path} could not be compared with the target's"
        return [remark], unmeasured
    try:
        ours = await asyncio.to_thread(own_logprobs, required.target_folder, tokens, log)
    except TargetTooLargeError as error:
        remark = f"{url} serves {path}: its weights could not be compared with the target's, {error}."
        remedy = " Start the server with --revision and its commit, which SGLang reports and which is compared instead."
        return [remark if served.known else remark + remedy], unmeasured
    difference, allowed = mean_difference(ours, theirs), served.tolerance(target)
    if difference > allowed and not served.known:
        raise wrong_server(
            url,
            f"serves {path} with other weights: its log-probs of {len(ours)} fixed tokens differ from those of the "
            f"target {target.source} by {difference:.3g} nats on average (at most {allowed:g} is rounding). Serve "
            f"revision {target.revision or target.digest[:12]}.",
        )
    if differs:
        largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        measured = TargetDifference(settings=differs, tokens=len(ours), mean=difference, largest=largest)
        return [f"{url} serves {path} with {measured.text}"], measured
    text = f"log-probs of {len(ours)} fixed tokens are {difference:.2g} nats from the target's"
    return [f"{url} serves {path}: {text}"], None


def own_logprobs(target_folder: Path, tokens: Sequence[int], log: Callable[[str], None]) -> list[float]:
    """Return the target's log-probs (nats) of `tokens` after the first, in its dtype on the CPU; computed once.

    Raises TargetTooLargeError instead of loading weights that do not fit into memory.
    """
    with _LOCK:  # several servers are checked concurrently, and one check loads the weights
        if (logprobs := _OWN_LOGPROBS.get((target_folder, *tokens))) is None:
            logprobs = _OWN_LOGPROBS[target_folder, *tokens] = _compute_logprobs(target_folder, tokens, log)
        return logprobs


def check_memory(target_folder: Path) -> str:
    """Return the size of a target's weights on the CPU. Raises TargetTooLargeError if they do not fit."""
    parameters = sum(p.numel() for p in model_without_weights(model_path(target_folder)).parameters())
    size = parameters * getattr(torch, read_target_info(target_folder).dtype).itemsize
    needed, free = f"{size / 1e9:.1f} GB", free_memory_bytes()
    if size > free:
        raise TargetTooLargeError(f"which takes {needed} of memory, and {free / 1e9:.1f} GB are free")
    return needed


def _compute_logprobs(target_folder: Path, tokens: Sequence[int], log: Callable[[str], None]) -> list[float]:
    needed = check_memory(target_folder)
    log(f"loading the target on the CPU, {needed}, to compare its log-probs with a server's")
    target = Target.load(target_folder, device="cpu")
    ids = torch.tensor([list(tokens)])
    logprobs = target.logits(target.read(ids).hidden[0, :-1]).float().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()


def mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the mean absolute difference of two lists of log-probs, nats."""
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
