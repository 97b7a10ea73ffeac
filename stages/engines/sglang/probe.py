"""Does a server compute with the target's weights, where no revision says so?

The server scores fixed tokens, and so does the target here, on the CPU: the mean absolute difference of their log-probs
is rounding for the same weights. SGLang's own `/weights_checker` cannot be held against files: it hashes tensors as
they lie on a GPU (merged, sharded, by a Triton kernel), and fails on a CPU.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TEXT = (
    "Question: a train leaves at 9:40 and arrives at 13:05. How long does it travel? Answer: from 9:40 to 13:05 there "
    "are 3 hours and 25 minutes.\n\ndef median(values: list[float]) -> float:\n    ordered = sorted(values)\n"
    "    middle = len(ordered) // 2\n    return ordered[middle]\n\nLa pluie est tombée toute la nuit, et au matin le "
    "jardin sentait la terre. In 1969 two people walked on the Moon for the first time."
)
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}  # nats, of the mean; the coarser of the two dtypes'
_LOCK = threading.Lock()
_KNOWN: dict[tuple[Path | int, ...], list[float]] = {}  # by a target's folder and the tokens


class NoRoomError(Exception):
    """The target does not fit into this machine's memory."""


def own_logprobs(target_folder: Path, tokens: Sequence[int], log: Callable[[str], None]) -> list[float]:
    """The target's log-probs (nats) of `tokens` behind the first, in its own dtype on the CPU; computed once.

    Raises NoRoomError instead of loading what the memory does not hold.
    """
    with _LOCK:  # of several servers that ask at once, one loads the weights
        if (known := _KNOWN.get((target_folder, *tokens))) is None:
            known = _KNOWN[target_folder, *tokens] = _own_logprobs(target_folder, tokens, log)
        return known


def _own_logprobs(target_folder: Path, tokens: Sequence[int], log: Callable[[str], None]) -> list[float]:
    import torch

    from draftsmith.artifacts.host import free_memory_bytes
    from draftsmith.stages.targets.causal_lm import Target
    from draftsmith.stages.targets.estimate import DTYPE_BYTES, target_size
    from draftsmith.stages.targets.info import model_path, read_target_info

    size = target_size(model_path(target_folder)).parameters * DTYPE_BYTES[read_target_info(target_folder).dtype]
    needed, free = f"{size / 1e9:.1f} GB", free_memory_bytes()
    if size > free:
        raise NoRoomError(f"which takes {needed} of memory where {free / 1e9:.1f} GB are free")
    log(f"the target is loaded on the CPU, {needed}: its log-probs are compared with a server's")
    target = Target.load(target_folder, device="cpu")
    hidden = target.read(torch.tensor([list(tokens)])).hidden[0, :-1]
    logprobs = target.logits(hidden).float().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def payload(tokens: Sequence[int]) -> dict[str, Any]:
    """The body of /generate that asks for them."""
    sampling = {"temperature": 0, "max_new_tokens": 1}
    return {"input_ids": list(tokens), "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}


def served_logprobs(body: dict[str, Any], tokens: Sequence[int]) -> list[float] | None:
    """What an answer to `payload` says; None if it does not say it of all tokens."""
    try:
        scored = body["meta_info"]["input_token_logprobs"][1:]
        found = [float(each[0]) for each in scored]
        asked = [int(each[1]) for each in scored]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return found if asked == list(tokens[1:]) and all(map(math.isfinite, found)) else None


def tolerance(ours: str, theirs: str | None) -> float:
    """Of the mean difference, for two dtypes; `theirs` None: the server does not say."""
    return max(TOLERANCE[ours], TOLERANCE.get(theirs or ours, TOLERANCE["bfloat16"]))


def mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Mean absolute difference of two lists of log-probs, nats."""
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
