"""Memory and servers of an evaluation."""

from __future__ import annotations

from draftsmith.stages.engines.config import EmbeddedEngineConfig, SGLangEngineConfig
from draftsmith.stages.engines.estimate import decoding, launched_servers
from draftsmith.stages.measure.config import EvaluationConfig
from draftsmith.stages.targets.estimate import PROCESS, Estimate, Use, tables_of


def evaluation_estimate(config: EvaluationConfig, use: Use) -> Estimate:
    """P · s + drafters · P_d · s, and features of one group.

    On the embedded engine also key/value memory at the highest concurrency, and for the comparison in float32 a second
    target and drafter: 4 · P + 4 · P_d.
    """
    sizes = use.sizes
    longest = sizes.longest_prompt + config.sampling.max_new_tokens
    concurrency = max(config.concurrency)
    parts = {
        "process": PROCESS,
        "target": sizes.weights(sizes.target),
        "drafters": use.drafters * sizes.weights(sizes.drafter),
        "head": sizes.reduced_head(config.head_tokens)[1],
        "features": 2.0 * max(config.tokens_per_target_forward, longest) * sizes.feature_bytes,
    }
    servers = None
    if isinstance(config.engine, EmbeddedEngineConfig):
        parts |= decoding(concurrency, longest, True, sizes.itemsize, sizes)
        if config.exactness_prompts:
            parts["target in float32"] = sizes.weights(sizes.target, 4) + sizes.weights(sizes.drafter, 4)
    elif isinstance(config.engine, SGLangEngineConfig):  # one server at a time
        servers = launched_servers(config.engine, 1, concurrency, longest, True, sizes)
    return Estimate(memory=parts, host=tables_of(use.answers), servers=servers)
