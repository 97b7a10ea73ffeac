"""Quotas, bounds and lots: what is chosen keeps every bound, and depends on nothing but content and seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.stages.prompting.selection import choose, lot

SOURCES = st.lists(st.sampled_from(["a", "b", "c"]), max_size=60)
QUOTAS = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.one_of(st.floats(0.05, 0.95), st.integers(1, 40)))


def chosen(sources: list[str], quotas: dict[str, float], rows: int | None = None) -> Counter[str]:
    mask = choose(np.arange(len(sources)), sources, quotas, rows)
    return Counter(source for source, kept in zip(sources, mask, strict=True) if kept)


@given(SOURCES, QUOTAS, st.one_of(st.none(), st.integers(1, 80)))
def test_every_bound_is_kept(sources: list[str], quotas: dict[str, float], rows: int | None) -> None:
    found = chosen(sources, quotas, rows)
    total = found.total()
    assert rows is None or total <= rows
    for source, quota in quotas.items():
        assert found[source] <= (quota * total + 1e-6 if quota < 1 else quota)


@given(SOURCES, st.one_of(st.none(), st.integers(1, 80)))
def test_without_quotas_everything_up_to_the_bound_is_used(sources: list[str], rows: int | None) -> None:
    assert chosen(sources, {}, rows).total() == min(len(sources), rows or len(sources))


def test_a_share_is_of_what_is_used_in_the_end() -> None:
    sources = ["a"] * 80 + ["b"] * 21
    assert chosen(sources, {"a": 0.3}) == {"a": 9, "b": 21}  # 9 of 30
    assert chosen(sources, {"a": 0.3}, rows=20) == {"a": 6, "b": 14}
    assert chosen(sources, {"a": 5}) == {"a": 5, "b": 21}
    assert chosen(sources, {"a": 0.5, "b": 0.4}) == {}


def test_the_order_says_which_ones() -> None:
    order = np.array([3, 1, 2, 0])
    assert choose(order, ["a", "a", "b", "b"], {"a": 1}, rows=2).tolist() == [False, True, False, True]


def test_lots_depend_on_content_and_seed() -> None:
    contents = [str(number).encode() for number in range(200)]
    first = sorted(contents, key=lambda each: lot(0, each))[:50]
    again = sorted(contents, key=lambda each: lot(1, each))[:50]
    assert 2 < len(set(first) & set(again)) < 30
