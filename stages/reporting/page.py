"""The report of a refresh: one HTML file with everything inside, readable without a network. The verdict is first."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.artifacts.atomic import write_text
from draftsmith.stages.measure.gate import CHAMPION, challenger_of
from draftsmith.stages.reporting import plots, rows, tables
from draftsmith.stages.reporting.contexts import contexts
from draftsmith.stages.reporting.markup import anchor, details, figure, items, paragraph, part, section, table, text
from draftsmith.stages.reporting.names import ABSENT, name_of
from draftsmith.stages.reporting.outcome import Tile, outcome, tiles
from draftsmith.stages.reporting.rows import Table
from draftsmith.stages.reporting.style import STYLE
from draftsmith.stages.reporting.verdict import findings


@dataclass(frozen=True)
class ReportData:
    """What a report shows. Anything absent (an empty mapping or list, a missing field) is left out or shown as —."""

    title: str
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # evaluation.json
    decision: Mapping[str, Any] = field(default_factory=dict)  # decision.json of the gate
    history: Sequence[Mapping[str, Any]] = ()  # at, what (promoted, checked), version, tau, low, high
    mining: Mapping[str, Any] = field(default_factory=dict)  # mining's summary.json
    contexts: Sequence[Mapping[str, Any]] = ()  # of the challenger, of contexts.json
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)  # arm -> (step, loss)
    staleness: Sequence[tuple[int, float]] = ()  # (step, share of trained anchors that the mined trace does not have)
    prompts: Mapping[str, Any] = field(default_factory=dict)  # prompts.json
    logs: Mapping[str, Any] = field(default_factory=dict)  # logs.json
    lineage: Sequence[Mapping[str, Any]] = ()  # name, stage, key, content_id, duration_s, metrics, created_at
    config: Mapping[str, Any] = field(default_factory=dict)  # artifact -> its stage's config


def render_report(path: Path, data: ReportData) -> None:
    """Write the page. The same data gives the same bytes."""
    shown = [each for each in _sections(data) if each[1]]
    links = "\n".join(f'<li><a href="#{anchor(title)}">{text(title)}</a></li>' for title, _ in shown)
    contents = f'<nav aria-label="Contents"><ul>\n{links}\n</ul></nav>' if shown else ""
    body = "\n".join(each for _, each in shown)
    write_text(
        path,
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{text(data.title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        '<a class="skip" href="#report">Skip to the verdict</a>\n'
        f"<header>\n<h1>{text(data.title)}</h1>\n{_written(data)}\n</header>\n"
        f'<main id="report" tabindex="-1">\n{_verdict(data)}\n{contents}\n{body}\n</main>\n</body>\n</html>\n',
    )


def _written(data: ReportData) -> str:
    """Of when the figures are, and of which machine."""
    made = [str(each["created_at"]) for each in data.lineage if each.get("created_at")]
    engine = data.evaluation.get("engine")
    said = [f"measured {max(made)[:16].replace('T', ' ')} UTC"] if made else []
    said += [f"engine: {engine}"] if engine else []
    machine = data.evaluation.get("machine") or {}
    if machine:
        gpus = Counter(machine["gpus"])
        named = [f"{count} × {name}" if count > 1 else name for name, count in gpus.items()]  # noqa: RUF001
        said.append(", ".join([*named, f"{machine['cores']} cores of {machine['cpu']}", f"{machine['memory_gb']} GB"]))
    return paragraph([" · ".join(said)])


def _verdict(data: ReportData) -> str:
    """The sentence, why, the figures that are read first, and what must not be relied on."""
    found = outcome(data.evaluation, data.decision)
    if found is None:
        return ""
    seconds = sum(each.get("duration_s") or 0.0 for each in data.lineage)
    doubted = items(rows.doubts(data.evaluation))
    warned = f'<div class="doubts" role="note">\n<h3>Not to be relied on</h3>\n{doubted}\n</div>' if doubted else ""
    return (
        f'<section class="verdict {found.kind}" aria-labelledby="verdict">\n<p class="badge">{text(found.label)}</p>\n'
        f'<h2 id="verdict">{text(found.sentence)}</h2>\n{items(found.reasons)}\n'
        f"{_tiles(tiles(data.evaluation, seconds))}\n{warned}\n</section>"
    )


def _tiles(shown: Sequence[Tile]) -> str:
    cells = "\n".join(
        f'<div><dt>{text(tile.label)}</dt><dd class="figure">{text(tile.figure)}</dd>'
        f'<dd class="beside">{text(tile.beside)}</dd></div>'
        for tile in shown
    )
    return f'<dl class="tiles">\n{cells}\n</dl>' if shown else ""


def _sections(data: ReportData) -> list[tuple[str, str]]:
    """(title, HTML) of everything below the verdict, in order."""
    evaluation = data.evaluation
    drafters = evaluation.get("drafters") or {}
    sets = {name: each for name, each in (evaluation.get("sets") or {}).items() if each}
    found: dict[str, list[str]] = {
        "Acceptance": [
            items(findings(evaluation)),
            table(tables.acceptance(evaluation)),
            part("By prompt set", "".join([_sets(sets), table(tables.by_set(evaluation))])) if sets else "",
            _figure(
                "By offset",
                plots.acceptance_by_offset,
                {arm: d["acceptance_by_offset"] for arm, d in drafters.items() if d.get("acceptance_by_offset")},
            ),
            _figure(
                "Accepted lengths",
                plots.accepted_lengths,
                {arm: d["accepted_histogram"] for arm, d in drafters.items() if d.get("accepted_histogram")},
            ),
            paragraph(rows.repetitions(evaluation), "quiet"),
        ],
        "Speed": [
            table(tables.speed(evaluation)),
            part("By setting", table(rows.by_setting(evaluation))),
            _time_split(evaluation),
            part("Exactness", paragraph(rows.exactness(evaluation))),
        ],
        "Gate": [paragraph(rows.chosen(evaluation)), table(rows.gate(data.decision))] if data.decision else [],
        "The line over time": [_line(data.history)],
        f"Worst contexts{_of_arm(data)}": [contexts(data.contexts)],
        "Training": [_training(data), _most_rejected(data.mining)],
        "Data": [
            paragraph(tables.logs_said(data.logs)),
            table(tables.prompts_table(data.prompts)),
            part("Set aside", table(tables.set_aside(data.prompts, data.logs))),
        ],
        "Cost": [table(tables.cost(data.lineage))],
        "Lineage and config": [_lineage(data.lineage), _config(data.config)],
    }
    return [(title, section(title, *parts)) for title, parts in found.items()]


def _of_arm(data: ReportData) -> str:
    return f" of {name_of(challenger_of(data.evaluation))}" if data.contexts and data.evaluation.get("drafters") else ""


def _sets(sets: Mapping[str, Any]) -> str:
    if len(sets) < 2:
        return ""
    arms = dict.fromkeys(arm for each in sets.values() for arm in each)
    return figure(plots.tau_by_set(sets, {arm: name_of(arm) for arm in arms}), "Bars: 95 % over the prompts of a set.")


def _time_split(evaluation: Mapping[str, Any]) -> str:
    return _figure(
        "Where the time goes",
        plots.time_split,
        {
            arm: (each["draft_share"], each["verify_share"])
            for arm, each in (evaluation.get("speed") or {}).items()
            if each.get("draft_share") is not None and each.get("verify_share") is not None
        },
    )


def _line(history: Sequence[Mapping[str, Any]]) -> str:
    if len(history) < 2:
        return ""
    note = "Each drafter on the prompts of its own refresh; bars: 95 % over prompts."
    return figure(plots.tau_over_time(history), note)


def _training(data: ReportData) -> str:
    curves = {arm: points for arm, points in data.curves.items() if points}
    made = ""
    if curves:
        note = "Each training has its own loss; their heights cannot be compared."
        made = figure(plots.training_curves(curves, {arm: name_of(arm) for arm in curves}), note)
    if data.staleness:
        note = "Share of the anchors trained on that the mined trace, of the weights before, does not have."
        made += part("Staleness of the mined trace", figure(plots.staleness(data.staleness), note))
    return made


def _most_rejected(mining: Mapping[str, Any]) -> str:
    tokens: Sequence[Mapping[str, Any]] = mining.get("most_rejected") or []
    if not tokens:
        return ""
    note = "Proposals that the target rejected first in a step of mining."
    certain = mining.get("certain_errors") or {}
    if (share := certain.get("share")) is not None:
        note += f" In {share:.0%} of all cases its best token had a probability of at least {certain['at_least']}."
    columns = list(tokens[0])
    cells = [[_cell(token.get(column)) for column in columns] for token in tokens]
    head = [column.replace("_", " ") for column in columns]
    shown = Table(head, cells, "Most rejected tokens", note)
    return part("Most rejected tokens", table(shown))


def _lineage(artifacts: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            f"{each.get('name', ABSENT)}{_version(each)}",
            str(each.get("stage", ABSENT)),
            str(each.get("key", ABSENT))[:16],
            str(each.get("content_id", ABSENT))[:16],
        ]
        for each in artifacts
    ]
    head = ["artifact", "stage", "key", "content id"]
    note = "`draftsmith show KEY` shows what an artifact was made from."
    return table(Table(head, cells, "Lineage", note, text_columns=4)) if cells else ""


def _version(artifact: Mapping[str, Any]) -> str:
    """Of a drafter that came from a line: which one."""
    config = artifact.get("config") or {}
    known = artifact.get("stage") == CHAMPION and {"line", "version"} <= config.keys()
    return f" ({config['line']} version {config['version']})" if known else ""


def _config(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    told = text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, default=str))
    return details("All settings", f'<pre tabindex="0">{told}</pre>')


def _figure(heading: str, draw: Any, series: Mapping[str, Any]) -> str:
    return part(heading, figure(draw(series, {arm: name_of(arm) for arm in series}))) if series else ""


def _cell(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) and value.isprintable() and value.strip() == value else repr(value)
