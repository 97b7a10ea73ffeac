"""Decoding speed: plain and speculative arms on the same engine, the same prompts, in alternation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.contract import StageContext
from stages.drafters.base import Drafter
from stages.drafters.checkpoint import load_drafter
from stages.drafters.config import DraftingConfig
from stages.engines.base import Completion, Request, SamplingParams
from stages.engines.embedded import EmbeddedEngine
from stages.measure.bootstrap import interval
from stages.stored import Prompt, request_seed
from stages.targets.causal_lm import Target

if TYPE_CHECKING:
    from stages.evaluation import EvaluationConfig

PLAIN = "plain"


class SpeedTest:
    """Runs prompts through one engine a measured arm; every arm sees the same prompts, settings and seeds."""

    def __init__(self, ctx: StageContext, target: Target, config: EvaluationConfig, seed: int):
        self.ctx, self.target, self.config, self.seed = ctx, target, config, seed
        self.params = SamplingParams(**config.sampling.model_dump())

    def _engine(self, target: Target, drafter: Drafter | None, block_size: int, capacity: int) -> EmbeddedEngine:
        drafting = DraftingConfig(block_size=block_size, head_tokens=self.config.head_tokens) if drafter else None
        return EmbeddedEngine(target, drafter, slots=self.config.concurrency, capacity=capacity, drafting=drafting)

    def _requests(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[Request]:
        params = params or self.params
        return [Request(p.prompt_id, p.token_ids, params, request_seed(self.seed, p.prompt_id, 0)) for p in prompts]

    def decode(
        self,
        target: Target,
        drafter: Drafter | None,
        block_size: int,
        prompts: Sequence[Prompt],
        max_new: int | None = None,
    ) -> tuple[list[Completion], float]:
        """Answers in the order of the prompts, and the wall time in seconds."""
        params = self.params
        if max_new is not None:
            params = SamplingParams(min(max_new, params.max_new_tokens), params.temperature, params.top_p)
        capacity = max(len(p.token_ids) for p in prompts) + params.max_new_tokens + block_size
        engine = self._engine(target, drafter, block_size, capacity)
        started = time.perf_counter()
        done = {c.request.request_id: c for c in engine.generate(self._requests(prompts, params))}
        return [done[p.prompt_id] for p in prompts], time.perf_counter() - started

    def warm_up(self, drafter: Drafter | None, block_size: int, prompts: Sequence[Prompt]) -> None:
        """First calls allocate and pick kernels; they are not measured."""
        self.decode(self.target, drafter, block_size, prompts[: self.config.concurrency], max_new=4)

    def alternate(
        self, drafters: Mapping[str, Drafter], prompts: Sequence[Prompt], block_size: int
    ) -> list[dict[str, Any]]:
        """Rows of the table `requests`: groups of `concurrency` prompts, the order of the arms rotating by group."""
        arms: list[tuple[str, Drafter | None]] = [(PLAIN, None), *drafters.items()]
        for _, drafter in arms:
            self.warm_up(drafter, block_size, prompts)
        rows: list[dict[str, Any]] = []
        groups = [prompts[i : i + self.config.concurrency] for i in range(0, len(prompts), self.config.concurrency)]
        for g, group in enumerate(groups):
            answers: dict[str, list[Completion]] = {}
            walls: dict[str, float] = {}
            for name, drafter in arms[g % len(arms) :] + arms[: g % len(arms)]:
                answers[name], walls[name] = self.decode(self.target, drafter, block_size, group)
                self.ctx.check_interrupted()
            for name, _ in arms:
                for prompt, answer, plain in zip(group, answers[name], answers[PLAIN], strict=True):
                    rows.append(self._row(name, prompt, answer, plain, walls[name] / len(group), block_size))
            self.ctx.progress(g + 1, len(groups), "groups of prompts")
        return rows

    def _row(
        self, arm: str, prompt: Prompt, answer: Completion, plain: Completion, seconds: float, block_size: int
    ) -> dict[str, Any]:
        difference = first_difference(answer.response_ids, plain.response_ids)
        return {
            "request_id": f"{prompt.prompt_id}/{arm}",
            "prompt_id": prompt.prompt_id,
            "arm": arm,
            "block_size": 1 if arm == PLAIN else block_size,
            "tokens": len(answer.response_ids),
            "verify_steps": len(answer.steps),
            "seconds": seconds,  # the group's wall time, shared equally by its prompts
            "draft_seconds": answer.draft_seconds,
            "verify_seconds": answer.verify_seconds,
            "temperature": self.params.temperature,
            "concurrency": self.config.concurrency,
            "identical": None if arm == PLAIN else difference < 0,
            "first_difference": difference,
            "margin": self._margin(prompt, plain, difference) if difference >= 0 else float("nan"),
        }

    def _margin(self, prompt: Prompt, plain: Completion, difference: int) -> float:
        """The target's logit margin (best minus second) where the two outputs part: small = a near-tie of the dtype."""
        tokens = prompt.token_ids + plain.response_ids[:difference]
        out = self.target.read(torch.tensor([tokens], device=self.target.device))
        best = self.target.logits(out.hidden[0, -1]).topk(2).values
        return float(best[0] - best[1])

    def equality(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Share of outputs equal to plain decoding in the serving dtype, and the margins where they part."""
        speculative = [row for row in rows if row["arm"] != PLAIN]
        margins = [row["margin"] for row in speculative if row["first_difference"] >= 0]
        return {
            "identical_share": sum(bool(row["identical"]) for row in speculative) / len(speculative),
            "compared_outputs": len(speculative),
            "median_margin": float(np.median(margins)) if margins else None,
            "largest_margin": max(margins) if margins else None,
        }


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Index of the first differing token, -1 if equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return -1 if len(a) == len(b) else min(len(a), len(b))


def choose_block_size(test: SpeedTest, drafter: Drafter, prompts: Sequence[Prompt]) -> tuple[int, dict[str, float]]:
    """The fastest candidate on validation prompts, and tokens/s of each. All arms then decode with it."""
    candidates = test.config.block_sizes or (drafter.block_size,)
    candidates = tuple(sorted({min(size, drafter.block_size) for size in candidates}))
    if len(candidates) == 1:
        return candidates[0], {}
    speeds = {}
    for size in candidates:
        test.warm_up(drafter, size, prompts)
        answers, seconds = test.decode(test.target, drafter, size, prompts)
        speeds[size] = sum(len(a.response_ids) for a in answers) / seconds
    return max(speeds, key=speeds.__getitem__), {str(size): value for size, value in speeds.items()}


def exactness_in_fp32(
    test: SpeedTest, target_folder: Path, drafter_folder: Path, prompts: Sequence[Prompt], block_size: int
) -> dict[str, int]:
    """Plain against speculative decoding in float32, token for token. Returns how many prompts, and how many equal."""
    if not test.config.exactness_prompts:
        return {"fp32_prompts": 0, "fp32_identical": 0}
    chosen = prompts[: test.config.exactness_prompts]
    target = Target.load(target_folder, dtype="float32")
    drafter = load_drafter(drafter_folder, target)
    plain, _ = test.decode(target, None, 1, chosen)
    speculative, _ = test.decode(target, drafter, block_size, chosen)
    same = sum(a.response_ids == b.response_ids for a, b in zip(plain, speculative, strict=True))
    return {"fp32_prompts": len(chosen), "fp32_identical": same}


def speed_table(
    rows: Sequence[Mapping[str, Any]], block_size: int, resamples: int, confidence: float, seed: int
) -> dict[str, dict[str, Any]]:
    """Tokens/s of each arm and the speed-up over plain decoding, with an interval over prompts."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    columns = {
        arm: {
            name: np.array([row[name] for row in rows if row["arm"] == arm], dtype=np.float64)
            for name in ("tokens", "seconds", "draft_seconds", "verify_seconds", "verify_steps")
        }
        for arm in arms
    }
    plain = columns[PLAIN]
    table: dict[str, dict[str, Any]] = {}
    for arm, c in columns.items():
        tokens, seconds = c["tokens"].sum(), c["seconds"].sum()
        table[arm] = {"tokens_per_s": float(tokens / seconds), "prompts": len(c["tokens"])}
        if arm == PLAIN:
            continue
        samples = (c["tokens"], c["seconds"], plain["tokens"], plain["seconds"])
        low, high = interval(_speedup, samples, resamples, confidence, seed)
        identical = [bool(row["identical"]) for row in rows if row["arm"] == arm]
        table[arm] |= {
            "speedup": float(_speedup(*samples)),
            "speedup_low": low,
            "speedup_high": high,
            "draft_share": float(c["draft_seconds"].sum() / seconds),
            "verify_share": float(c["verify_seconds"].sum() / seconds),
            # the prefill's token is committed before any verify step
            "tau_served": float((tokens - len(c["tokens"])) / max(1.0, c["verify_steps"].sum())),
            "identical_share": sum(identical) / len(identical),
            "block_size": block_size,
        }
    return table


def _speedup(
    tokens: np.ndarray, seconds: np.ndarray, plain_tokens: np.ndarray, plain_seconds: np.ndarray, axis: int = -1
) -> np.ndarray:
    return (tokens.sum(axis) / seconds.sum(axis)) / (plain_tokens.sum(axis) / plain_seconds.sum(axis))
