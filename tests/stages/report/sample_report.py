"""Plausible metrics for a report, all computed from formulas."""

from __future__ import annotations

import math
from typing import Any

from draftsmith.artifacts.results.data import LogsSummary, PromptsSummary
from draftsmith.artifacts.results.evaluation import AnswerContext, EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.artifacts.store.manifest import Manifest
from draftsmith.stages.report.metrics import LineageEntry
from draftsmith.stages.report.page import ReportData
from draftsmith.stages.report.stage import HistoryPoint
from draftsmith.stages.report.tables import Step


def _around(value: float, reach: float) -> dict[str, float]:
    return {"value": value, "low": value - reach, "high": value + reach}


def verdict(kind: str, arm: str, other: str, value: float, reach: float, **changes: Any) -> dict[str, Any]:
    """Return one of four verdicts of a report; different if its interval shows it."""
    equal = 0 if kind == "tau" else 1
    found = {"kind": kind, "arm": arm, "other": other, **_around(value, reach), "level": 0.9875, "prompts": 40}
    if kind == "speed":
        found |= {"prompts": 6, "turns": 5, "turns_needed": 5}
    return found | {"different": abs(value - equal) > reach} | changes


def _drafter(tau: float, difference: float, rate: float, block: int = 8) -> dict[str, Any]:
    return {
        "tau": tau,
        "tau_low": tau - 0.111,
        "tau_high": tau + 0.108,
        "prompts": 40,
        "differences": {"sft": _around(difference, 0.049)} if difference else {},
        "acceptance_by_offset": [rate**offset for offset in range(1, block)],
        "accepted_histogram": [round(1000 * (1 - rate) * rate**length) for length in range(block)],
        "block_size": block,
    }


def _speed(tokens_per_s: float, draft: float, tau: float) -> dict[str, Any]:
    return {
        "tokens_per_s": tokens_per_s,
        "turns": 5,
        "prompts": 6,
        "speedup": tokens_per_s / 61.3,
        "speedup_low": tokens_per_s / 61.3 - 0.04,
        "speedup_high": tokens_per_s / 61.3 + 0.05,
        "draft_share": draft,
        "verify_share": 0.9 - draft,
        "identical_share": 0.98,
        "block_size": 6,
        "tau_served": tau,
    }


EVALUATION: dict[str, Any] = {
    "definition_of_tau": "tokens committed per verify step, the correction or bonus token counted (+1)",
    "drafters": {
        "sft": _drafter(3.412, 0.0, 0.72),
        "opd": _drafter(3.543, 0.131, 0.75)
        | {"differences": {"sft": _around(0.131, 0.049), "control": _around(0.113, 0.047)}},
        "control": _drafter(3.430, 0.018, 0.73),
    },
    "training_seeds": {"sft": 0, "opd": 0, "control": 0},
    "verdicts": [
        verdict("tau", "opd", "sft", 0.131, 0.07),
        verdict("tau", "opd", "control", 0.113, 0.068),
        verdict("tau", "control", "sft", 0.018, 0.07),
        verdict("speed", "opd", "sft", 1.041, 0.02),
    ],
    "block_size_candidates": {"sft": {"3": 80.0, "6": 88.0}},
    "validation_prompts": 3,
    "speed": {
        "plain": {"tokens_per_s": 61.3, "turns": 5, "prompts": 6},
        "sft": _speed(88.1, 0.21, 3.2),
        "opd": _speed(91.7, 0.205, 3.31),
        "control": _speed(88.9, 0.21, 3.22),
    },
    "exactness": {
        "fp32_prompts": 50,
        "fp32_identical": 50,
        "serving_dtype": "bfloat16",
        "identical_share": 0.98,
        "median_margin": 0.031,
    },
    "loop_share": 0.07,
    "tau_without_loops": {"sft": 3.21, "opd": 3.35, "control": 3.22},
}


SERVED: dict[str, Any] = {  # the same on a server, at two concurrencies
    **EVALUATION,
    "engine": "sglang 0.5.20",
    "exactness": {"serving_dtype": "float32", "identical_share": 1.0},
    "speed_by_setting": [
        {
            "temperature": 0.0,
            "concurrency": concurrency,
            "arms": {
                arm: {
                    **figures,
                    "tokens_per_s": figures["tokens_per_s"] * concurrency,
                    "request_tokens_per_s_median": figures["tokens_per_s"],
                    "first_token_s_median": 0.021 * concurrency,
                    "first_token_s_p95": 0.043 * concurrency,
                }
                for arm, figures in EVALUATION["speed"].items()
            },
        }
        for concurrency in (1, 16)
    ],
    "parity": {
        "sft": {"served_steps": 52, "different_steps": 3},
        "opd": {"served_tau": 3.31, "replayed_tau": 3.32, "tau_difference": 0.003},
    },
}


def sample(**changes: Any) -> ReportData:
    parts: dict[str, Any] = {
        "title": "Draft model refresh: quickstart",
        "evaluation": EVALUATION,
        "history": [
            {"at": "2026-01-05T06:00:00+00:00", "what": "promoted", "version": 1, "tau": 3.1, "low": 3.0, "high": 3.2},
            {"at": "2026-01-12T06:00:00+00:00", "what": "checked", "version": 1, "tau": 3.0, "low": 2.9, "high": 3.1},
            {"at": "2026-01-19T06:00:00Z", "what": "checked", "version": 1, "tau": 2.7, "low": None, "high": None},
        ],
        "lineage": [
            entry(name, 12.5 * i, {"line": "smollm2", "version": 3} if name == "champion" else {"steps": 600})
            for i, name in enumerate(
                ["target", "prompts", "champion", "rollout", "sft", "assisted", "mining", "opd", "evaluation"]
            )
        ],
        "config": {"sft": {"steps": 600, "learning_rate": 6e-4}, "opd": {"steps": 200, "loss": "matched"}},
    }
    parts |= changes
    parts["evaluation"] = EvaluationResult.model_validate(parts["evaluation"])
    parts["history"] = [HistoryPoint.model_validate(point) for point in parts["history"]]
    return ReportData(**parts)


def entry(
    name: str, seconds: float, config: dict[str, Any], stage: str | None = None, **metrics: float
) -> LineageEntry:
    manifest = Manifest(
        schema_version=1, stage=stage or name, key="0123456789abcdef" * 4, content_id="fe" * 32, created_at="",
        config=config, inputs={}, code_digest="", seed=0, files={}, metrics=metrics, mlflow_run_id=None,
        duration_s=seconds, versions={}, modules={}, external={},
    )  # fmt: skip
    return LineageEntry(name, manifest)


HOSTILE = '</span><script>console.error("acted")</script><img src="x" onerror="console.error(1)">\u202e\x1b[2J'


def _compared(kind: str, other: str, value: float, error: float, **fields: Any) -> dict[str, Any]:
    spread = {"units": 40, "degrees": 39.0}
    found = {"kind": kind, "arm": "opd", "other": other, "value": value, "error": error, **spread}
    if base := fields.get("base"):
        found["gain"] = {"value": value / base, "error": error / base, **spread}
    return found | fields


SETS = {
    name: {
        arm: {"tau": tau + shift, "low": tau + shift - 0.2, "high": tau + shift + 0.2, "prompts": 20}
        | ({"speedup": 1.4, "speedup_low": 1.3, "speedup_high": 1.5} if arm == "opd" and shift else {})
        for arm, tau in (("champion", 3.3), ("sft", 3.41), ("opd", 3.54))
    }
    for name, shift in (("chat", -0.4), ("code & math", 0.5), (f"anyone's {HOSTILE}", 0.0))
}


def load_point(arm: str, other: str, concurrency: int, factor: float, tokens_per_s: float) -> dict[str, Any]:
    """Return the predicted speed of an arm at one number of requests in flight."""
    estimate = {"value": math.log(factor), "error": 0.02, "units": 5, "degrees": 4.0}
    point = {"arm": arm, "other": other, "concurrency": concurrency, "block_size": 8 if concurrency < 16 else 4}
    return {**estimate, **point, "tokens_per_s": tokens_per_s}


OF_A_LINE: dict[str, Any] = {  # an evaluation against a champion, with a speed warning
    **SERVED,
    "temperature": 0.0,
    "concurrency": 1,
    "drafters": {"champion": _drafter(3.3, 0.0, 0.7), **EVALUATION["drafters"]},
    "sets": SETS,
    "acceptance_by_offset": {"chat": {"champion": [0.75, 0.5, 0.375], "opd": [0.5, 0.25]}},
    "comparisons": [
        _compared("tau", "champion", 0.24, 0.02, set=None, base=3.3),
        *(_compared("tau", "champion", 0.2, 0.05, set=name, base=3.3) for name in SETS),
        _compared("speed", "champion", math.log(1.03), 0.01, temperature=0.0, concurrency=1),
        _compared("speed", "plain", math.log(1.496), 0.02, temperature=0.0, concurrency=1),
    ],
    "verdicts": [
        verdict("tau", "sft", "champion", 0.112, 0.15),
        verdict("tau", "opd", "champion", 0.243, 0.07),
        verdict("tau", "opd", "control", 0.113, 0.068),
        verdict("tau", "control", "champion", 0.13, 0.16),
        verdict("speed", "opd", "champion", 1.03, 0.02),
    ],
    "speed": {"plain": EVALUATION["speed"]["plain"], "champion": _speed(89.0, 0.21, 3.1), **EVALUATION["speed"]},
    "validation_tau": {"sft": 3.4, "opd": 3.5, "control": 3.42},
    "load": [
        load_point(arm, other, concurrency, factor / concurrency**0.2, 90.0 * concurrency**0.7)
        for concurrency in (1, 4, 16)
        for arm, other, factor in (("opd", "plain", 1.5), ("opd", "champion", 1.1), ("champion", "plain", 1.4))
    ],
    "machine": {"cpu": "AMD EPYC 9B14", "cores": 16, "memory_gb": 128, "gpus": ["NVIDIA H100", "NVIDIA H100"]},
    "speed_warnings": [
        {
            "kind": "noise",
            "text": "repetitions of the same prompts leave ±12% on the speed-up of opd: the machine was too busy",
            "temperature": 0.0,
            "concurrency": 1,
            "arms": [],
        }
    ],
}


def rule(name: str, passed: bool = True, judged: bool = True, said: str = "why", **figures: float) -> dict[str, Any]:
    """Return a rule of a gate's decision."""
    return {"name": name, "passed": passed, "conclusive": judged, "text": said, "metrics": figures}


OF_SPEED = "1.031 times the champion's, at most 1.052 at 95 %; at least 0.980 wanted"
DECISION: dict[str, Any] = {
    "promote": False,
    "outcome": "inconclusive",
    "challenger": "opd",
    "champion": "3",
    "sentence": "inconclusive: opd against version 3: speed-up: 1.496 times, inconclusive",
    "rules": [
        rule("checksums", said="every file is as it was written"),
        rule("tau", said="+7.3% of the champion's, at least +6.2%", value=0.073, end=0.062, wanted=0.0),
        rule("speed at temperature 0, 16 in flight", said=OF_SPEED, value=1.031, end=1.052, wanted=0.98),
        rule("speed-up", passed=False, judged=False, said="1.496 times, inconclusive: load"),
    ],
}
CONTEXTS = [
    {
        "kind": "worst" if place < 10 else "typical",
        "tau": 1.0 + place / 6,
        "set": "chat",
        "trajectory_id": f"{place:064x}/0",
        "position": 12 * place,
        "before": "def area(radius):\n    # the area of a circle\n    return ",
        "steps": [
            {"accepted": " 3.14", "rejected": " times", "dropped": " the radius", "chosen": " *"},
            {"accepted": "", "rejected": HOSTILE if place == 0 else "\n", "dropped": "", "chosen": " radius"},
            {"accepted": " **", "rejected": "", "dropped": "", "chosen": " 2"},
        ],
        "after": "\n\nprint(area(2))" * 3,
    }
    for place in range(12)
]


def of_a_line(**changes: Any) -> ReportData:
    """Return a report in which no part is missing."""
    parts: dict[str, Any] = {
        "evaluation": OF_A_LINE,
        "decision": GateDecision.model_validate(DECISION),
        "contexts": [AnswerContext.model_validate(each) for each in CONTEXTS],
        "facts": {"measured": "2026-01-19 06:00 UTC", "on": "2 × NVIDIA H100", "commit": "0123456789ab"},  # noqa: RUF001
        "steps": [Step("measure again", "draftsmith run weekly.yaml", 130.0)],
        "prompts": PromptsSummary.model_validate({
            "counts": {name: {"heldout": 20, "train": 400, "validation": 8} for name in SETS},
            "duplicates_removed": 3,
            "too_long_skipped": 2,
            "set_aside": {"row 17 of a file: no field prompt": 4},
        }),
        "logs": LogsSummary.model_validate({
            "rows_in_files": 12000, "rows_read": 12000, "used": 9000, "replayed": 300, "response_tokens": 2_345_678,
            "set_aside": {"not the target's tokens": 41}, "outside_window": 2500, "not_drawn": 159, "scored": 64,
            "improbable": {"sampled otherwise": 1}, "window": {"newest": "2026-01-18T23:59:00+00:00"},
        }),
    }  # fmt: skip
    return sample(**(parts | changes))
