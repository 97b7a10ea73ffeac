"""The report of a refresh: one HTML file with everything inside, readable without a network."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.artifacts.atomic import write_text
from draftsmith.stages.reporting import plots

NAMES = {"plain": "Plain decoding", "sft": "SFT", "opd": "SFT + OPD", "control": "SFT continued"}
ABSENT = "—"

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d8dce2, #3a3f47); --soft: light-dark(#f4f6f8, #22262c);
        --quiet: light-dark(#5b6470, #a3acb8); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: light-dark(#16191d, #e8ebee); background: light-dark(#fff, #15181c); }
h1 { margin-bottom: .2rem } h2 { margin-top: 2.4rem; font-size: 1.2rem }
.quiet, caption, figcaption { color: var(--quiet); font-size: .9rem } .lead { font-size: 1.1rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
.wide { overflow-x: auto } caption { caption-side: bottom; text-align: left; padding-top: .4rem }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; vertical-align: top;
         border-bottom: 1px solid var(--line) }
th { font-weight: 600; white-space: normal; vertical-align: bottom; border-bottom-width: 2px }
th:first-child, td.text, th.text { text-align: left }
figure { margin: 1rem 0 } svg { width: 100%; height: auto } svg text { font-family: inherit }
code, pre { font: .85rem/1.45 ui-monospace, monospace } pre { background: var(--soft); padding: 1rem; overflow-x: auto }
summary { cursor: pointer }
""".strip()


@dataclass(frozen=True)
class ReportData:
    """What a report shows. Anything absent (an empty mapping or list, a missing field) is left out or shown as —."""

    title: str
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # evaluation.json
    mining: Mapping[str, Any] = field(default_factory=dict)  # mining's summary.json
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)  # arm -> (step, loss)
    lineage: Sequence[Mapping[str, Any]] = ()  # name, stage, key, content_id, duration_s
    config: Mapping[str, Any] = field(default_factory=dict)  # artifact -> its stage's config
    rejected_rows: int = 20  # rows of the table of most rejected tokens


def render_report(path: Path, data: ReportData) -> None:
    """Write the page. The same data gives the same bytes."""
    title = html.escape(data.title)
    body = "\n".join(part for part in _parts(data) if part)
    write_text(
        path,
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{STYLE}\n</style>\n</head>\n'
        f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n",
    )


TO_SFT = ("diff_to_sft", "diff_low", "diff_high")  # of a drafter's tau: difference, and its interval
TO_CONTROL = ("diff_to_control", "diff_to_control_low", "diff_to_control_high")


def findings(evaluation: Mapping[str, Any]) -> list[str]:
    """What the evaluation found, in words, for who decides on a drafter: how each compares with the SFT drafter, OPD
    also with SFT continued, and whether outputs stayed the target's own.

    A difference within its interval is called that.
    """
    sentences = []
    for arm, figures in evaluation.get("drafters", {}).items():
        for other, names in (("sft", TO_SFT), ("control", TO_CONTROL)):
            difference, low, high = (figures.get(name) for name in names)
            if arm != other and difference is not None:
                sentences.append(_compared(_name(arm), _name(other), difference, low, high))
    for arm, figures in evaluation.get("speed", {}).items():
        factor, low, high = (figures.get(f"speed_to_sft{part}") for part in ("", "_low", "_high"))
        if factor is not None:
            verdict = ", measurably" if _clear_of(1, low, high) else ""
            sentences.append(
                f"{_name(arm)} decodes at {factor:.3f} times the speed of SFT{verdict} (95 % interval "
                f"{_number(low, '.3f')} to {_number(high, '.3f')}, {figures.get('prompts', 0)} prompts)."
            )
    exact = evaluation.get("exactness", {})
    if (prompts := exact.get("fp32_prompts")) and exact.get("fp32_identical") != prompts:
        sentences.append(
            f"Do not serve these drafters: in fp32 only {exact.get('fp32_identical')} of {prompts} outputs equal plain "
            "decoding, so that something changes what the target says."
        )
    return sentences


def _compared(arm: str, other: str, difference: float, low: float | None, high: float | None) -> str:
    interval = f"tau {difference:+.3f} (95 % interval {_signed(low)} to {_signed(high)})"
    if not _clear_of(0, low, high):
        return f"{arm} does not differ measurably from {other}: {interval}."
    return f"{arm} is {'better' if difference > 0 else 'worse'} than {other}: {interval}."


def _clear_of(value: float, low: float | None, high: float | None) -> bool:
    """Whether an interval leaves a value out; one without width (of a single prompt) says nothing."""
    return low is not None and high is not None and low < high and not low <= value <= high


def _parts(data: ReportData) -> Iterable[str]:
    drafters, speed = data.evaluation.get("drafters", {}), data.evaluation.get("speed", {})
    yield _headline(data.evaluation)
    yield _settings(data.evaluation)
    yield _exactness(data.evaluation)
    yield _repetitions(data.evaluation)
    yield _figure(
        "Acceptance by offset",
        plots.acceptance_by_offset,
        {arm: d["acceptance_by_offset"] for arm, d in drafters.items() if d.get("acceptance_by_offset")},
    )
    yield _figure(
        "Accepted lengths",
        plots.accepted_lengths,
        {arm: d["accepted_histogram"] for arm, d in drafters.items() if d.get("accepted_histogram")},
    )
    yield _figure(
        "Where the time goes",
        plots.time_split,
        {
            arm: (s["draft_share"], s["verify_share"])
            for arm, s in speed.items()
            if s.get("draft_share") is not None and s.get("verify_share") is not None
        },
    )
    yield _figure(
        "Training",
        plots.training_curves,
        {arm: points for arm, points in data.curves.items() if points},
        "Each training has its own loss; their heights cannot be compared.",
    )
    yield _most_rejected(data.mining.get("most_rejected") or [], data.rejected_rows)
    yield _lineage(data.lineage)
    if data.config:
        text = html.escape(json.dumps(data.config, indent=2, sort_keys=True, ensure_ascii=False, default=str))
        yield f"<h2>Config</h2>\n<details><summary>All settings</summary>\n<pre>{text}</pre>\n</details>"


def _headline(evaluation: Mapping[str, Any]) -> str:
    drafters, speed = evaluation.get("drafters", {}), evaluation.get("speed", {})
    rows = []
    to_control = any(TO_CONTROL[0] in figures for figures in drafters.values())
    for arm in [arm for arm in NAMES if arm in drafters or arm in speed]:
        d, s = drafters.get(arm, {}), speed.get(arm, {})
        rows.append(
            [
                _name(arm),
                _interval(d.get("tau"), d.get("tau_low"), d.get("tau_high")),
                ABSENT if arm == "sft" else _difference(d, TO_SFT),
                *([_difference(d, TO_CONTROL)] if to_control else []),
                _number(s.get("tokens_per_s"), ".1f"),
                _interval(
                    s.get("speedup"), s.get("speedup_low"), s.get("speedup_high"), unit=" \N{MULTIPLICATION SIGN}"
                ),
                _number(s.get("block_size"), "d"),
                _number(s.get("tau_served"), ".2f"),
                _number(s.get("identical_share"), ".1%"),
            ]
        )
    if not rows:
        return ""
    head = [
        "",
        "tau",
        "tau minus SFT's",
        *(["tau minus that of SFT continued"] if to_control else []),
        "tokens/s",
        "speed-up",
        "block served",
        "tau served",
        "identical outputs",
    ]
    lead = "".join(f'<p class="lead">{html.escape(sentence)}</p>\n' for sentence in findings(evaluation))
    definition = evaluation.get("definition_of_tau")
    caption = (
        f"tau: {definition}. " if definition else ""
    ) + "In brackets: 95 % bootstrap intervals, paired by prompt."
    return f"{lead}{_table(head, rows, caption)}"


def _settings(evaluation: Mapping[str, Any]) -> str:
    """Speed at every temperature and concurrency, where there is more than the headline holds."""
    settings = evaluation.get("speed_by_setting") or []
    if len(settings) < 2 and not any("first_token_s_median" in arm for s in settings for arm in s["arms"].values()):
        return ""
    rows = [
        [
            _name(arm),
            f"{setting['temperature']:g}",
            str(setting["concurrency"]),
            _number(s.get("tokens_per_s"), ".1f"),
            _interval(s.get("speedup"), s.get("speedup_low"), s.get("speedup_high"), unit=" \N{MULTIPLICATION SIGN}"),
            _number(s.get("tau_served"), ".2f"),
            _number(s.get("request_tokens_per_s_median"), ".1f"),
            _number(s.get("first_token_s_median"), ".3f"),
            _number(s.get("first_token_s_p95"), ".3f"),
            _number(s.get("identical_share"), ".1%"),
        ]
        for setting in settings
        for arm, s in setting["arms"].items()
    ]
    head = ["", "temperature", "requests in flight", "tokens/s", "speed-up", "tau served", "tokens/s of a request"]
    head += ["first token, s", "95th percentile", "identical outputs"]
    caption = f"Engine: {evaluation.get('engine', ABSENT)}. Tokens/s of a request and its first token: medians."
    return f"<h2>Speed by setting</h2>\n{_table(head, rows, caption)}"


def _exactness(evaluation: Mapping[str, Any]) -> str:
    e = evaluation.get("exactness", {})
    sentences = []
    if e.get("fp32_prompts"):
        sentences.append(
            f"In fp32, {e.get('fp32_identical')} of {e['fp32_prompts']} outputs of speculative decoding equal plain "
            "decoding, token for token."
        )
    if e.get("identical_share") is not None:
        where = f"In {e.get('serving_dtype') or 'the serving dtype'}"
        sentences.append(
            f"{where} it is {e['identical_share']:.1%}."
            if sentences
            else f"{where}, {e['identical_share']:.1%} of the outputs of speculative decoding equal plain decoding."
        )
    if e.get("median_margin") is not None:
        sentences.append(f"At the first difference the target's median logit margin is {e['median_margin']:.3f}.")
    for arm, figures in (evaluation.get("parity") or {}).items():
        if "served_steps" in figures:
            sentences.append(
                f"{_name(arm)}: {figures['different_steps']} of {figures['served_steps']} verify steps that the engine "
                "served differ from replay."
            )
        else:
            sentences.append(
                f"{_name(arm)}: tau is {figures['served_tau']:.3f} as served and {figures['replayed_tau']:.3f} in "
                "replay."
            )
    return f"<h2>Exactness</h2>\n<p>{html.escape(' '.join(sentences))}</p>" if sentences else ""


def _repetitions(evaluation: Mapping[str, Any]) -> str:
    share, taus = evaluation.get("loop_share"), evaluation.get("tau_without_loops") or {}
    if share is None:
        return ""
    text = f"{share:.1%} of the held-out answers repeat some six tokens three times or more."
    figures = [f"{_name(arm)} {tau:.2f}" for arm, tau in taus.items() if isinstance(tau, int | float)]
    if figures:
        text += f" tau without them: {', '.join(figures)}."
    return f"<p>{html.escape(text)}</p>"


def _most_rejected(tokens: Sequence[Mapping[str, Any]], rows: int) -> str:
    if not tokens:
        return ""
    columns = list(tokens[0])
    cells = [[_cell(token.get(column)) for column in columns] for token in tokens[:rows]]
    head = [column.replace("_", " ") for column in columns]
    return (
        f"<h2>Most rejected tokens</h2>\n{_table(head, cells, 'Proposals that the target rejected first in a step.')}"
    )


def _lineage(artifacts: Sequence[Mapping[str, Any]]) -> str:
    if not artifacts:
        return ""
    rows = [
        [
            str(a.get("name", ABSENT)),
            str(a.get("stage", ABSENT)),
            str(a.get("key", ABSENT))[:16],
            str(a.get("content_id", ABSENT))[:16],
            _number(a.get("duration_s"), ".1f"),
        ]
        for a in artifacts
    ]
    head = ["artifact", "stage", "key", "content id", "seconds"]
    return f"<h2>Lineage</h2>\n{_table(head, rows, '`draftsmith show KEY` shows what an artifact was made from.')}"


def _figure(heading: str, draw: Any, series: Mapping[str, Any], caption: str = "") -> str:
    if not series:
        return ""
    note = f"\n<figcaption>{caption}</figcaption>" if caption else ""
    return f"<h2>{heading}</h2>\n<figure>\n{draw(series, {arm: _name(arm) for arm in series})}{note}\n</figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    headers = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = []
    for row in rows:
        first, *others = (html.escape(cell).replace("\n", "<br>") for cell in row)
        lines.append(f'<tr><td class="text">{first}</td>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>')
    return (
        f'<div class="wide"><table>\n<caption>{html.escape(caption)}</caption>\n<thead><tr>{headers}</tr></thead>\n'
        f"<tbody>\n{chr(10).join(lines)}\n</tbody>\n</table></div>"
    )


def _name(arm: str) -> str:
    return NAMES.get(arm, arm)


def _number(value: float | None, spec: str) -> str:
    return ABSENT if value is None else format(value, spec)


def _signed(value: float | None) -> str:
    return ABSENT if value is None else f"{value:+.3f}"


def _interval(value: float | None, low: float | None, high: float | None, sign: str = "", unit: str = "") -> str:
    if value is None:
        return ABSENT
    if low is None or high is None:
        return f"{value:{sign}.3f}{unit}"
    return f"{value:{sign}.3f}{unit}\n[{low:{sign}.3f}, {high:{sign}.3f}]"


def _difference(figures: Mapping[str, Any], names: tuple[str, str, str]) -> str:
    value, low, high = (figures.get(name) for name in names)
    return _interval(value, low, high, "+")


def _cell(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) and value.isprintable() and value.strip() == value else repr(value)
