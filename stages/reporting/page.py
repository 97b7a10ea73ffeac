"""The report of a refresh: one HTML file with everything inside, readable without a network."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.artifacts.atomic import write_text
from draftsmith.stages.reporting import plots, rows
from draftsmith.stages.reporting.names import ABSENT, name_of
from draftsmith.stages.reporting.rows import Table
from draftsmith.stages.reporting.verdict import findings

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
td.text, th.text { text-align: left }
figure { margin: 1rem 0 } svg { width: 100%; height: auto } svg text { font-family: inherit }
code, pre { font: .85rem/1.45 ui-monospace, monospace } pre { background: var(--soft); padding: 1rem; overflow-x: auto }
summary { cursor: pointer }
""".strip()


@dataclass(frozen=True)
class ReportData:
    """What a report shows. Anything absent (an empty mapping or list, a missing field) is left out or shown as —."""

    title: str
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # evaluation.json
    decision: Mapping[str, Any] = field(default_factory=dict)  # decision.json of the gate
    history: Sequence[Mapping[str, Any]] = ()  # at, what (promoted, checked), version, tau, low, high
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


def _parts(data: ReportData) -> Iterable[str]:
    drafters, speed = data.evaluation.get("drafters", {}), data.evaluation.get("speed", {})
    if data.decision:
        yield f'<p class="lead"><strong>{html.escape(str(data.decision["sentence"]))}</strong></p>'
    yield _headline(data.evaluation)
    if judged := rows.gate(data.decision):
        yield f"<h2>{judged.title}</h2>\n{_table(judged)}"
    if table := rows.by_setting(data.evaluation):
        yield f"<h2>{table.title}</h2>\n{_table(table)}"
    yield _section("Exactness", rows.exactness(data.evaluation))
    yield _section("", rows.repetitions(data.evaluation))
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
    if len(data.history) > 1:
        figure = plots.tau_over_time(data.history)
        note = "Of the champions, each on its own refresh's prompts; bars: 95 % over prompts."
        yield f"<h2>The line over time</h2>\n<figure>\n{figure}\n<figcaption>{note}</figcaption>\n</figure>"
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
    table = rows.headline(evaluation)
    if table is None:
        return ""
    lead = "".join(f'<p class="lead">{html.escape(sentence)}</p>\n' for sentence in findings(evaluation))
    return f"{lead}{_table(table)}"


def _section(heading: str, sentences: Sequence[str]) -> str:
    title = f"<h2>{heading}</h2>\n" if heading else ""
    return f"{title}<p>{html.escape(' '.join(sentences))}</p>" if sentences else ""


def _most_rejected(tokens: Sequence[Mapping[str, Any]], count: int) -> str:
    if not tokens:
        return ""
    columns = list(tokens[0])
    cells = [[_cell(token.get(column)) for column in columns] for token in tokens[:count]]
    head = [column.replace("_", " ") for column in columns]
    table = Table(head, cells, caption="Proposals that the target rejected first in a step.")
    return f"<h2>Most rejected tokens</h2>\n{_table(table)}"


def _lineage(artifacts: Sequence[Mapping[str, Any]]) -> str:
    if not artifacts:
        return ""
    cells = [
        [
            str(a.get("name", ABSENT)),
            str(a.get("stage", ABSENT)),
            str(a.get("key", ABSENT))[:16],
            str(a.get("content_id", ABSENT))[:16],
            rows.number(a.get("duration_s"), ".1f"),
        ]
        for a in artifacts
    ]
    head = ["artifact", "stage", "key", "content id", "seconds"]
    table = Table(head, cells, caption="`draftsmith show KEY` shows what an artifact was made from.")
    return f"<h2>Lineage</h2>\n{_table(table)}"


def _figure(heading: str, draw: Any, series: Mapping[str, Any], caption: str = "") -> str:
    if not series:
        return ""
    note = f"\n<figcaption>{caption}</figcaption>" if caption else ""
    return f"<h2>{heading}</h2>\n<figure>\n{draw(series, {arm: name_of(arm) for arm in series})}{note}\n</figure>"


def _table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        texts = [html.escape(cell).replace("\n", "<br>") for cell in cells]
        marks = [' class="text"' if column < table.text_columns else "" for column in range(len(texts))]
        return f"<tr>{''.join(f'<{tag}{mark}>{text}</{tag}>' for mark, text in zip(marks, texts, strict=True))}</tr>"

    body = "\n".join(line(cells, "td") for cells in table.rows)
    return (
        f'<div class="wide"><table>\n<caption>{html.escape(table.caption)}</caption>\n'
        f"<thead>{line(table.head, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _cell(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) and value.isprintable() and value.strip() == value else repr(value)
