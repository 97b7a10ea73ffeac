"""The worst contexts on the page: what was proposed, what the target chose, in the text where it happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from draftsmith.stages.reporting.markup import text

LEGEND = (
    "<p class='quiet'>Each is the stretch of one held-out answer in which fewest proposals were kept. "
    "<span class='kept'>Kept proposals</span> are underlined, a <del>rejected proposal</del> and what was "
    "<del class='dropped'>proposed behind it</del> are struck out, and what the "
    "<span class='chosen'>target chose</span> instead is boxed. ␣ is a space, ⏎ a line break.</p>"
).replace("'", '"')


def contexts(found: Sequence[Mapping[str, Any]]) -> str:
    """found: of `contexts.json`, one arm's."""
    if not found:
        return ""
    return f"{LEGEND}\n" + "\n".join(_context(place, each) for place, each in enumerate(found, start=1))


def _context(place: int, each: Mapping[str, Any]) -> str:
    steps = "".join(_step(step) for step in each["steps"])
    title = (
        f"{place}. tau {each['tau']:.2f} over {len(each['steps'])} verify steps: {each['set']}, answer "
        f"{each['trajectory_id'][:16]}, from token {each['position']}"
    )
    return (
        f'<article class="context">\n<h3>{text(title)}</h3>\n'
        f'<p><span class="around">{text(each["before"])}</span>{steps}<span class="around">{text(each["after"])}</span>'
        "</p>\n</article>"
    )


def _step(step: Mapping[str, str]) -> str:
    """A reader hears what is marked too: `del` alone is not told by every screen reader."""
    parts = []
    if step["kept"]:
        parts.append(f'<span class="kept">{text(step["kept"])}</span>')
    if step["rejected"]:
        parts.append(f'<del title="proposed, rejected">{_token(step["rejected"])}</del>')
    if step["dropped"]:
        parts.append(f'<del class="dropped" title="proposed behind it">{_token(step["dropped"])}</del>')
    if step["chosen"]:
        parts.append(f'<span class="chosen" title="the target\'s choice">{_token(step["chosen"])}</span>')
    return "".join(parts)


def _token(piece: str) -> str:
    """White space that would not be seen at the edges of a mark is drawn."""
    shown = text(piece).replace("\n", "⏎")
    inner = shown.strip(" ")
    lead = len(shown) - len(shown.lstrip(" "))
    return "␣" * lead + inner + "␣" * (len(shown) - lead - len(inner)) if inner else "␣" * len(shown)
