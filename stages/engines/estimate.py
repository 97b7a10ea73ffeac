"""Memory of decoding: in this process, or on SGLang servers."""

from __future__ import annotations

from draftsmith.stages.engines.config import EmbeddedEngineConfig, SGLangEngineConfig
from draftsmith.stages.targets.estimate import PROCESS, Servers, Sizes


def decoding(
    slots: int, longest: int, drafter: bool, itemsize: int, sizes: Sizes, *, rings: bool = False
) -> dict[str, float]:
    """Key/value memory of target and drafter: slots · (T + block) · (2 · layers · kv_heads · head_dim · s).

    rings: of the drafter's layers that slide, window + block positions at most.
    Logits of one verification: slots · block · V · (4 + s).
    """
    block = sizes.block_size if drafter else 1
    kept = (longest + block) * sizes.target.kv_bytes_per_token(itemsize)
    if drafter:
        own = sizes.drafter
        whole = (longest + block) * own.kv_bytes_per_token(itemsize)
        kept += own.kv_bytes(longest + block, block, itemsize) if rings else whole
    return {
        "key/value memory": float(slots * kept),
        "logits": float(slots * block * sizes.target.vocabulary * (4 + itemsize)),
    }


def embedded_memory(
    engine: EmbeddedEngineConfig, longest: int, drafter: bool, head_tokens: int | None, sizes: Sizes
) -> dict[str, float]:
    """P · s + P_d · s + key/value memory of all slots + logits of one step; packed on a CPU are a head, V · H · s, and
    copies of the drafter and of its part of the head."""
    parts = {"process": PROCESS, "target": sizes.weights(sizes.target)}
    packed = sizes.itemsize == 2 and not sizes.accelerated  # see `targets/packed.py`; the decoder's are replaced
    if packed:
        parts["packed head"] = float(sizes.target.vocabulary * sizes.target.hidden * sizes.itemsize)
    if drafter:
        parts["drafter"] = sizes.weights(sizes.drafter)
        parts["head"] = sizes.reduced_head(head_tokens)[1]
        if packed:
            parts["packed drafter"] = parts["drafter"] + parts["head"]
    return parts | decoding(engine.slots, longest, drafter, sizes.itemsize, sizes, rings=True)


def launched_servers(
    engine: SGLangEngineConfig, servers: int, concurrency: int, longest: int, drafter: bool, sizes: Sizes
) -> Servers | None:
    """A GPU needs (P · s + P_d · s + concurrency · (T + block) · key/value bytes) / tp. None: they run already.

    Fewer tokens of key/value memory only make SGLang queue; less than one request's is an error of its own.
    """
    if engine.launch is None:
        return None
    launch = engine.launch
    servers *= launch.data_parallel  # each a replica with the requests of its own
    s, tp = sizes.itemsize, launch.tensor_parallel
    parts = {"target": sizes.weights(sizes.target, s) / tp}
    if drafter:
        parts["drafter"] = sizes.weights(sizes.drafter, s) / tp
    needed = decoding(concurrency, longest, drafter, s, sizes)["key/value memory"]
    parts[f"key/value memory of {concurrency} requests"] = needed / tp
    return Servers(servers * tp, parts)
