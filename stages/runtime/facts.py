"""Shows an object as a few facts, in a terminal and in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


class Facts:
    """Shows an object as one line of facts, and in a notebook as a small table of them."""

    def _facts(self) -> Mapping[str, object]:
        """Return name -> value of the facts to show."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {', '.join(f'{name} {value}' for name, value in self._facts().items())}"

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in self._facts().items()
        )
        return f"<table>{''.join(rows)}</table>"
