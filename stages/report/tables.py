"""Tables of a review and next steps as commands: the same on the final screen and in the report."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import CHAMPION, EvaluationResult
from draftsmith.stages.evaluation.verdicts import estimate_of, load_factor, too_small
from draftsmith.stages.report.metrics import LineageEntry, device_seconds, wall_seconds
from draftsmith.stages.report.review import ABSENT, MetricDifference, Review, duration, interval, name_of, number
from draftsmith.stages.runtime.invocation import Invocation
from draftsmith.stages.runtime.statistics import simultaneous_level

_COUNTS = ("response_tokens", "positions", "tflop")  # metrics that stages report


@dataclass(frozen=True)
class Table:
    """A table with its head and caption."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    text_columns: int = 1  # the first ones hold words, the others numbers


def drafters(review: Review, evaluation: EvaluationResult, *, short: bool = False) -> Table:
    """Return acceptance length and speed of every variant, with adjusted significance. short: for a screen."""
    digits = ".2f" if short else ".3f"
    others = [review.other] if short and review.other else _others(variant.differences for variant in review.variants)
    timed = [] if short else _others(variant.speed_over for variant in review.variants)
    replayed = {} if short else {arm: drafter.tau_replayed for arm, drafter in evaluation.drafters.items()}
    with_replayed = any(tau is not None for tau in replayed.values())
    rows = []
    for variant in review.variants:
        differences = [variant.differences.get(other) for other in others]
        factors = [variant.speed_over.get(other) for other in timed]
        speed = evaluation.speed.get(variant.arm)
        rows.append(
            [
                f"{variant.name} ◂" if variant.is_challenger else variant.name,
                variant.acceptance.text(digits),
                *([number(replayed.get(variant.arm), digits)] if with_replayed else []),
                *((f"{d.value:+.2f}{d.mark}" if short else d.text("+.3f")) if d else ABSENT for d in differences),
                number(variant.tokens_per_s, ",.1f"),
                f"{variant.speedup.text(digits)}{' *' * variant.unreliable}" if variant.speedup else ABSENT,
                *(factor.text(digits) if factor else ABSENT for factor in factors),
                *([] if short else [number(speed.block_size if speed is not None else None, "d")]),
            ]
        )
    head = ["", "acceptance length", *(["by replay under transformers"] if with_replayed else [])]
    head += [*(f"vs {name_of(other)}" for other in others), "tokens/s", "speed-up"]
    head += [] if short else [*(f"speed vs {name_of(other)}" for other in timed), "block"]
    caption = _legend(rows, review)
    if evaluation.target_difference is not None:
        caption += f"  As served, with {evaluation.target_difference.text}."
    return Table(head, rows, "Drafters", caption.strip())


def _others(differences: Iterable[Mapping[str, MetricDifference]]) -> list[str]:
    return list(dict.fromkeys(other for by_arm in differences for other in by_arm))


def _legend(rows: Sequence[Sequence[str]], review: Review) -> str:
    """Return the meaning of the marks in a table."""
    shown = "\n".join(cell for row in rows for cell in row)
    marks = {"◂": "◂ challenger", " n.s.": "n.s. not significant", " ?": "? inconclusive", " *": "* unreliable"}
    marks["["] = f"[95 %, for {review.comparisons} comparisons]" if review.comparisons > 1 else "[95 %]"
    return "  ".join(meaning for mark, meaning in marks.items() if mark in shown)


def by_setting(evaluation: EvaluationResult) -> Table:
    """Return the speed at every temperature and concurrency."""
    columns = {
        "tokens/s": ("tokens_per_s", ",.1f"),
        "speed-up": ("speedup", ".3f"),
        "acceptance length, served": ("tau_served", ".2f"),
        "draft time": ("draft_share", ".0%"),
        "verify time": ("verify_share", ".0%"),
        "tokens/s of a request": ("request_tokens_per_s_median", ".1f"),
        "first token s": ("first_token_s_median", ".3f"),
        "95th percentile": ("first_token_s_p95", ".3f"),
        "identical outputs": ("identical_share", ".1%"),
    }
    rows = [
        [
            number(table.temperature, "g"),
            number(table.concurrency, "d"),
            name_of(arm),
            *(number(getattr(metrics, field), form) for field, form in columns.values()),
        ]
        for table in evaluation.speed_by_setting
        for arm, metrics in table.arms.items()
    ]
    head = ["temperature", "in flight", "decoding with", *columns]
    return Table(head, rows, "Speed by setting", text_columns=3)


def single_points(evaluation: EvaluationResult) -> dict[str, str]:
    """Return a sentence for each plot that would have only one point, by name of the plot."""
    sentences = {}
    drafters, curves = evaluation.drafters, {arm: evaluation.load_curve(arm) for arm in evaluation.drafters}
    if drafters and all(len(drafter.acceptance_by_offset) == 1 for drafter in drafters.values()):
        shares = (f"{name_of(arm)} {drafter.acceptance_by_offset[0]:.0%}" for arm, drafter in drafters.items())
        sentences["by_offset"] = f"A block has one proposal. Share accepted: {', '.join(shares)}."
    if curves and all(len(curve) == 1 for curve in curves.values()):
        points = {arm: point for arm, (point,) in curves.items()}
        speeds = (f"{name_of(arm)} {interval(load_factor(point), '.2f')}" for arm, point in points.items())
        in_flight = next(iter(points.values())).concurrency
        requests = f"{in_flight} request{'s' * (in_flight != 1)} in flight"
        sentences["by_load"] = f"Speed-up with {requests}: {', '.join(speeds)}.".replace("\n", " ")
    return sentences


def by_load(evaluation: EvaluationResult) -> Table:
    """Return the speed of each drafter at every number of requests in flight: predicted, or measured on servers."""
    with_champion, rows = evaluation.has_champion, []
    for arm in evaluation.drafters:
        over_champion = {speed.concurrency: speed for speed in evaluation.load_curve(arm, CHAMPION)}
        for point in evaluation.load_curve(arm):
            compared = over_champion.get(point.concurrency)
            vs_champion = interval(load_factor(compared), ".3f") if compared else ABSENT
            rows.append(
                [
                    name_of(arm),
                    number(point.concurrency, "d"),
                    number(point.tokens_per_s, ",.1f"),
                    interval(load_factor(point), ".3f"),
                    *([vs_champion] if with_champion else []),
                    number(point.block_size, "d"),
                ]
            )
    head = ["", "in flight", "tokens/s", "speed-up", *(["speed vs champion"] if with_champion else []), "block"]
    note = (
        "Predicted from acceptance in replay and the times of single steps in this process, at the fastest block size, "
        "with 95 % intervals. More requests in flight were not measured."
    )
    if evaluation.load_is_measured:
        note = f"Measured on servers at temperature {number(evaluation.temperature, 'g')}, with 95 % intervals."
    if schedule := evaluation.schedule(evaluation.challenger):
        setting = f"num_speculative_tokens_per_batch_size: {schedule}"
        note += (
            f" If steps of a vLLM server scale like these, set {setting} in its speculative config: `draftsmith "
            "export` prints all of it, and for EAGLE-3 SGLang's."
        )
    return Table(head, rows, "Speed by load", note)


@dataclass(frozen=True)
class SliceGain:
    """The challenger's gain over the champion on one slice, as a share of the champion's acceptance length."""

    name: str
    value: float
    ends: tuple[float, float] | None  # of an interval that holds jointly with the others; None: inconclusive
    problem: str = ""  # why it is inconclusive


def slice_gains(evaluation: EvaluationResult) -> list[SliceGain]:
    """Return the challenger's gain on each slice; empty without a champion."""
    if not evaluation.has_champion:
        return []
    compared = evaluation.slices(evaluation.challenger)
    gains = {
        comparison.set or "": estimate_of(comparison.gain)
        for comparison in compared
        if comparison.base and comparison.gain is not None
    }
    problems = {name: too_small(gain) for name, gain in gains.items()}
    level = simultaneous_level(sum(not problem for problem in problems.values()))
    return [
        SliceGain(name, gain.value, None if problems[name] else gain.interval(level), problems[name])
        for name, gain in gains.items()
    ]


def by_slice(evaluation: EvaluationResult) -> Table:
    """Return the acceptance length of each drafter on every slice, and the challenger's gain over the champion."""
    slices = {name: arms for name, arms in evaluation.sets.items() if arms}
    arms = [arm for arm in evaluation.drafters if any(arm in by_arm for by_arm in slices.values())]
    gains = {gain.name: gain for gain in slice_gains(evaluation)}
    rows = []
    for name, by_arm in slices.items():
        prompts = max((by_arm[arm].prompts or 0 for arm in arms if arm in by_arm), default=0)
        metrics = [by_arm.get(arm, SetMetrics()) for arm in arms]
        lengths = [interval((cell.tau, cell.low, cell.high), ".3f") for cell in metrics]
        rows.append([name, str(prompts), *lengths, *([_gain(gains.get(name))] if gains else [])])
    head = ["slice", "prompts", *map(name_of, arms), *(["challenger vs champion"] if gains else [])]
    note = "Acceptance lengths. In brackets: 95 % intervals of each single slice."
    note += " Those of the gains hold for all slices together." * bool(gains)
    return Table(head, rows, "By slice", note)


def by_offset(evaluation: EvaluationResult) -> Table:
    """Return the acceptance by offset of each drafter on every slice."""
    rows = [
        [name, name_of(arm), *(number(share, ".3f") for share in shares)]
        for name, arms in evaluation.acceptance_by_offset.items()
        for arm, shares in arms.items()
    ]
    widest = max(map(len, rows), default=0)
    head = ["slice", "", *map(str, range(1, widest - 1))]
    note = "Share of the proposals at each offset that are accepted, with all before them."
    rows = [row + [ABSENT] * (widest - len(row)) for row in rows]
    return Table(head, rows, "Acceptance by offset and slice", note, text_columns=2)


def confidence(evaluation: EvaluationResult) -> Table:
    """Return the calibration of each drafter's confidence head, before and after its correction."""
    confidences = {
        arm: drafter.confidence for arm, drafter in evaluation.drafters.items() if drafter.confidence is not None
    }
    fields = {"confidence": ".3f", "accepted": ".3f", "error": ".4f", "error_calibrated": ".4f"}
    fields |= {"decisions": ",d", "scale": ".3f", "shift": "+.3f"}
    rows = [
        [name_of(arm), *(number(getattr(drafter, f), form) for f, form in fields.items())]
        for arm, drafter in confidences.items()
    ]
    head = ["", "mean confidence", "share accepted", "calibration error", "calibrated", "proposals", "scale", "shift"]
    note = (
        "Of held-out proposals whose predecessors were accepted: expected calibration error in 15 bins, with the logit "
        "as it is and as scale · logit + shift, fitted on the validation split. `draftsmith export --calibrated` folds "
        "these into the checkpoint."
    )
    return Table(head, rows, "Confidence", note)


def _gain(gain: SliceGain | None) -> str:
    if gain is None:
        return ABSENT
    if gain.problem:
        return f"{gain.value:+.1%} inconclusive: {gain.problem}"
    return interval((gain.value, *(gain.ends or (None, None))), "+.1%")


def gate(review: Review) -> Table:
    """Return every rule with its result, its metrics and the threshold."""
    rows = [[check.name, f"{check.tick} {check.result}", check.text] for check in review.checks]
    return Table(("rule", "result", "metrics"), rows, "Gate", text_columns=3)


def choice_sentence(evaluation: EvaluationResult) -> str:
    """Return why this variant is the challenger, and which one measured better; empty if there was no choice."""
    lengths = {arm: tau for arm, tau in (evaluation.validation_tau or {}).items() if arm != CHAMPION}
    if len(lengths) < 2:
        return ""
    listed = ", ".join(f"{name_of(arm)} {number(tau, '.3f')}" for arm, tau in lengths.items())
    challenger = name_of(evaluation.challenger)
    on = "the validation split" if evaluation.chosen_on is None else f"{evaluation.chosen_on} validation prompts"
    sentence = f"{challenger} is the challenger: it has the highest acceptance length on {on} ({listed})."
    if (better := evaluation.better_arm) is None:
        return sentence
    taus = [number(evaluation.drafters[arm].tau, ".2f") for arm in (better, evaluation.challenger)]
    return f"{sentence} On the held-out prompts {name_of(better)} measured better ({taus[0]} against {taus[1]})."


def stages(lineage: Sequence[LineageEntry]) -> Table:
    """Return every artifact behind the report, with its time and tokens, and the totals."""
    rows = [
        [name, where, duration(wall_seconds(group)), duration(device_seconds(group)), *_counts(group)]
        for name, where, group in [*((_name(stage), stage.key, [stage]) for stage in lineage), ("total", "", lineage)]
    ]
    head = [
        "node",
        "artifact",
        "wall time",
        "device time",
        "tokens generated",
        "positions trained",
        "TFLOP of training",
    ]
    note = (
        "Wall time of the attempt that finished, with reused stages. Device time: wall time times the config's devices."
    )
    return Table(head, rows, "Stages", note, text_columns=2)


def _name(entry: LineageEntry) -> str:
    config = entry.manifest.config
    known = entry.manifest.stage == CHAMPION and {"line", "version"} <= config.keys()
    return f"{entry.name} ({config['line']}@{config['version']})" if known else entry.name


def _counts(lineage: Sequence[LineageEntry]) -> list[str]:
    cells = []
    for metric in _COUNTS:
        values = [value for entry in lineage if (value := entry.count(metric)) is not None]
        total = sum(values)
        cells.append(ABSENT if not values else f"{total:,.0f}" if total >= 100 else f"{total:.3g}")
    return cells


_UNSAFE = ("checksums", "lossless")  # groups of rules: a drafter that breaks one is not promoted by hand either


@dataclass(frozen=True)
class Step:
    """A command, its purpose, and its duration if known."""

    purpose: str
    command: str
    seconds: float | None = None

    @property
    def label(self) -> str:
        """Return the purpose, with the time."""
        return self.purpose if self.seconds is None else f"{self.purpose}, about {duration(max(1, self.seconds))}"


def next_steps(review: Review, command: Invocation, seconds: Mapping[str, float]) -> list[Step]:
    """Return the next steps after this outcome. command: this refresh's. seconds: durations of its nodes."""
    look = Step("see why", shlex.join(["draftsmith", "report", command.config, "--open"]))
    if command.line is None:
        return [look]
    challenger, champion = f"{command.line}@{command.version}", f"{command.line}@champion"
    by_hand = Step("promote it by hand", shlex.join(["draftsmith", "promote", challenger, "--why", "…"]))
    kind = review.outcome.kind
    if kind == "promoted":
        folder = f"{command.line}-champion"
        return [
            Step("serve it", shlex.join(["draftsmith", "export", champion, folder])),
            Step("next refresh: measures drift first, trains if there is any", command.run()),
        ]
    if kind == "inconclusive":
        purpose = (
            f"measure {review.more_prompts} more prompts, and decide again" if review.more_prompts else "measure again"
        )
        again = Step(purpose, command.run("--from", "evaluation"), seconds.get("evaluation"))
        first = again if review.more_prompts is not None else look
        tau_only = Step(
            "judge by acceptance length", command.run("--set", "gate.judge_speed=false"), seconds.get("gate")
        )
        unclear = {check.group for check in review.checks if check.result == "inconclusive"}
        return [first, *([tau_only] if unclear and unclear <= {"speed", "speed-up"} else []), by_hand]
    unsafe = any(check.result == "failed" and check.group in _UNSAFE for check in review.checks)
    drafters = [challenger, *([champion] if review.other == CHAMPION else [])]
    compare = Step("measure the drafters again", command.command("evaluate", drafters=drafters))
    lost = next((v.differences.get(review.other or "") for v in review.variants if v.is_challenger), None)
    if lost is not None and lost.significant and lost.value < 0:  # nobody promotes that by hand
        loss = Step(f"see how it was trained: train/loss of run {review.challenger}", command.mlflow)
        return [look, *([loss] if command.mlflow else []), compare]
    return [look, compare, *([] if unsafe else [by_hand])]


def refresh_anyway(command: Invocation) -> Step:
    """Return the next step if the champion is current."""
    return Step("refresh anyway", command.run("--force", "drift"))
