"""The report's HTML: everything that is shown goes through `text`, every table has a container of its own."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from draftsmith.artifacts.printable import printable
from draftsmith.stages.reporting.rows import Table


def text(value: object) -> str:
    """As HTML shows it: no markup of others acts, and no control or invisible character is left."""
    return html.escape(printable(str(value)))


def anchor(title: str) -> str:
    """The id of a section."""
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower()).strip("-")


def section(title: str, *parts: str) -> str:
    """A landmark with its heading; empty if nothing is in it."""
    body = "\n".join(part for part in parts if part)
    name = anchor(title)
    return (
        f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{text(title)}</h2>\n{body}\n'
        "</section>"
        if body
        else ""
    )


def part(title: str, body: str) -> str:
    """A titled part of a section."""
    return f"<h3>{text(title)}</h3>\n{body}" if body else ""


def paragraph(sentences: Iterable[str], kind: str = "") -> str:
    said = " ".join(sentences)
    mark = f' class="{kind}"' if kind else ""
    return f"<p{mark}>{text(said)}</p>" if said else ""


def items(sentences: Sequence[str], kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    lines = "\n".join(f"<li>{text(sentence)}</li>" for sentence in sentences)
    return f"<ul{mark}>\n{lines}\n</ul>" if sentences else ""


def table(shown: Table | None) -> str:
    """In a container that scrolls by itself, by touch and by keyboard: the page never does sideways."""
    if shown is None or not shown.rows:
        return ""

    def line(cells: Sequence[str], head: bool) -> str:
        made = []
        for column, cell in enumerate(cells):
            tag = "th" if head or column == 0 else "td"
            scope = ' scope="col"' if head else ' scope="row"' if column == 0 else ""
            mark = ' class="text"' if column < shown.text_columns else ""
            made.append(f"<{tag}{scope}{mark}>{text(cell).replace(chr(10), '<br>')}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    label = text(shown.title or shown.caption.partition(".")[0] or "table")
    note = f"<figcaption>{text(shown.caption)}</figcaption>" if shown.caption else ""
    body = "\n".join(line(cells, head=False) for cells in shown.rows)
    return (
        f'<figure class="table">\n<div class="wide" role="region" aria-label="{label}" tabindex="0"><table>\n'
        f"<thead>{line(shown.head, head=True)}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n{note}</figure>"
    )


def figure(svg: str, caption: str = "") -> str:
    note = f"\n<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f"<figure>\n{svg}{note}\n</figure>"


def details(summary: str, body: str) -> str:
    return f"<details>\n<summary>{text(summary)}</summary>\n{body}\n</details>" if body else ""
