"""What every stage needs of a machine, by its name. The formulas stand beside the code that they are about.

No stage imports this module: a better estimate makes no artifact anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from draftsmith.stages.engines.config import EmbeddedEngineConfig
from draftsmith.stages.engines.estimate import embedded_memory, launched_servers
from draftsmith.stages.logs import LogsConfig
from draftsmith.stages.measure.estimate import evaluation_estimate
from draftsmith.stages.mining import SAMPLE, MiningConfig
from draftsmith.stages.replay.estimate import mining_memory
from draftsmith.stages.rollout import RolloutConfig
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.targets.estimate import PROCESS, TRACE_STEPS_PER_TOKEN, Answers, Estimate, Use, tables_of
from draftsmith.stages.targets.source import source_kind
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.estimate import training_estimate
from draftsmith.stages.training.on_policy.config import OpdConfig


def of_target(config: TargetConfig, use: Use) -> Estimate:
    """The dequantised copy of a GGUF file, P · s; a folder or a hub's snapshot stays where it is."""
    copied = source_kind(config.source) in ("gguf", "package")
    return Estimate(files={"target": use.sizes.weights(use.sizes.target)} if copied else {})


def of_rollout(config: RolloutConfig, use: Use) -> Estimate:
    """With a drafter in the loop 8 · (block - 1) + 24 bytes for each verify step beside the answers."""
    sizes, drafter = use.sizes, use.drafters > 0
    longest = sizes.longest_prompt + config.sampling.max_new_tokens
    count = sum(config.counts(use.prompts).values()) * config.samples_per_prompt
    made = Answers(longest, count, count * config.sampling.max_new_tokens * TRACE_STEPS_PER_TOKEN)
    memory: dict[str, float] = {}
    servers = None
    if isinstance(config.engine, EmbeddedEngineConfig):
        memory = embedded_memory(config.engine, longest, drafter, config.drafting.head_tokens, sizes)
    elif config.engine.launch is not None:
        launched, in_flight = config.engine.launch.servers, config.engine.concurrency
        servers = launched_servers(config.engine, launched, in_flight, longest, drafter, sizes)
    traced = made.verify_steps * (8 * (sizes.block_size - 1) + 24) if drafter else 0.0
    return Estimate(memory=memory, host=tables_of(made), servers=servers, tables=made.bytes + traced, makes=made)


def of_logs(config: LogsConfig, use: Use) -> Estimate:
    """Its tables, as far as the config says how many rows there are, and the target where it reads answers."""
    longest = config.max_tokens or use.sizes.positions
    steps = (config.rows or 0) * longest * TRACE_STEPS_PER_TOKEN
    made = Answers(longest, config.rows or float("inf"), steps)
    memory = {"process": PROCESS, "target": use.sizes.weights(use.sizes.target)} if config.scored else {}
    return Estimate(memory=memory, host=tables_of(made), tables=made.bytes, makes=made)


def of_sft(config: SftConfig, use: Use) -> Estimate:
    """Without steps P · s and 4 · P_d in one process, which reads the drafter and writes it, P_d · s."""
    if config.steps:
        return training_estimate(config, use)
    target, drafter = use.sizes.target, use.sizes.drafter
    memory = {"process": PROCESS, "target": use.sizes.weights(target), "drafter": use.sizes.weights(drafter, 4)}
    return Estimate(memory=memory, host=tables_of(use.answers), files={"drafters": use.sizes.weights(drafter)})


def of_mining(config: MiningConfig, use: Use) -> Estimate:
    """A row of the table is 8 · (block - 1) + 72 bytes."""
    sizes, tokens = use.sizes, config.tokens_per_target_forward
    scored = config.table == "scored"
    memory = mining_memory(tokens, config.drafting.head_tokens, use.longest, sizes, scored=scored)
    steps = use.answers.verify_steps if use.answers is not None else 0.0
    if config.table == "sample" and use.answers is not None:
        steps *= min(1.0, SAMPLE / use.answers.count)
    return Estimate(memory=memory, host=tables_of(use.answers), tables=steps * (8 * (sizes.block_size - 1) + 72))


def of_opd(config: OpdConfig, use: Use) -> Estimate:
    return training_estimate(config, use, mines=config.oldest_trace > 0, scores=config.loss.needs_scores)


ESTIMATES: dict[str, Callable[[Any, Use], Estimate]] = {
    "target": of_target,
    "rollout": of_rollout,
    "logs": of_logs,
    "sft": of_sft,
    "mining": of_mining,
    "opd": of_opd,
    "evaluation": evaluation_estimate,
}
