"""The page of config fields is the one that the models make."""

from __future__ import annotations

from tests.config_reference import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(), "run python -m tests.config_reference"


def test_every_field_has_a_meaning() -> None:
    fields = [row.split(" | ") for row in page().splitlines() if row.startswith(("| `", "| *`"))]
    assert len(fields) > 200
    assert [cells[0] for cells in fields if cells[-1].strip(" |") == "" and "`kind`" not in cells[0]] == []
