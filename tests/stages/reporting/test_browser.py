"""The page in Debian's headless Chromium: on a phone and a desk, light and dark, by keyboard and on paper."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from draftsmith.stages.reporting.page import render_report
from tests.stages.reporting.sample_report import of_a_line
from tests.testbed.chromium import ABSENT, PROGRAM, Browser, browser

pytestmark = [pytest.mark.integration, pytest.mark.skipif(PROGRAM is None, reason=ABSENT)]
PAPER = 718  # CSS pixels of A4 between margins of 1 cm

CONTRASTS = """(() => {
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll('h1, h2, h3, p, li, th, td, dt, dd, figcaption, a, del, summary, .chosen')]
    .filter(e => e.textContent.trim() && !e.classList.contains('skip')).map(e => {
      const [a, b] = [luminance(parts(getComputedStyle(e).color)), luminance(ground(e))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 30)];
    });
})()"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium"), limit_s=120) as page:
        yield page


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    render_report(path, of_a_line())
    return path.as_uri()


def sizes(page: Browser, selector: str) -> list[list[float]]:
    """(scroll width, client width) of the elements."""
    found: list[list[float]] = page.evaluate(
        f"[...document.querySelectorAll({selector!r})].map(e => [e.scrollWidth, e.clientWidth])"
    )
    return found


@pytest.mark.parametrize("first", [60, 61])
def test_a_browser_starts_whatever_numbers_its_pipes_have(first: int, tmp_path: Path) -> None:
    with ExitStack() as opened:
        while (number := os.open(os.devnull, os.O_RDONLY)) < first - 1:
            opened.callback(os.close, number)
        opened.callback(os.close, number)
        with browser(tmp_path) as page:
            assert page.call("Browser.getVersion")["product"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_no_error_and_every_plot_is_drawn(
    width: int, dark: bool, chromium: Browser, url: str, tmp_path: Path
) -> None:
    chromium.open(url, width=width, dark=dark)
    assert chromium.complaints == []
    assert [each for each in chromium.requested if not each.startswith(("file:", "data:"))] == []
    ((scroll, client),) = sizes(chromium, "html")
    assert scroll <= client == width
    outside = chromium.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide, svg, pre'))"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    boxes = chromium.evaluate(
        "[...document.querySelectorAll('svg')].map(e => [e.getAttribute('aria-label'), "
        "e.getBoundingClientRect().width, e.querySelectorAll('path').length])"
    )
    assert len(boxes) == 7
    assert all(box[1] > 250 and box[2] > 5 for box in boxes), boxes
    faint = [each for each in chromium.evaluate(CONTRASTS) if each[0] < 4.5]
    assert faint == []
    chromium.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_the_verdict_is_on_the_first_screen_of_a_phone(chromium: Browser, url: str) -> None:
    chromium.open(url, width=390, height=844)
    top = chromium.evaluate("document.querySelector('#verdict').getBoundingClientRect().bottom")
    assert top < 500
    assert chromium.evaluate("document.querySelector('.badge').textContent") == "Not promoted: inconclusive"


def test_what_models_wrote_is_text(chromium: Browser, url: str) -> None:
    chromium.open(url, width=1280)
    assert chromium.complaints == []
    assert chromium.evaluate("document.querySelectorAll('script, img, iframe').length") == 0
    assert '<script>console.error("acted")</script>' in chromium.evaluate(
        "document.querySelector('.context').innerText"
    )
    assert not any(mark in chromium.evaluate("document.body.innerText") for mark in ("\u202e", "\x1b"))


def test_the_page_is_walked_by_keyboard_and_by_landmarks(chromium: Browser, url: str) -> None:
    chromium.open(url, width=390)
    chromium.press("Tab", 9)
    assert chromium.evaluate("document.activeElement.className") == "skip"
    assert chromium.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    assert chromium.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    unnamed = chromium.evaluate(
        "[...document.querySelectorAll('main section, nav, [role=region]')].filter(e => !(e.getAttribute('aria-label') "
        "|| document.getElementById(e.getAttribute('aria-labelledby'))?.textContent)).length"
    )
    assert unnamed == 0
    assert chromium.evaluate("document.querySelectorAll('main').length") == 1
    levels = chromium.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    wider = chromium.evaluate(
        "(() => { const all = [...document.querySelectorAll('.wide')]; const e = all.find(e => e.scrollWidth > "
        "e.clientWidth); e.focus(); return document.activeElement === e })()"
    )
    assert wider, "a table that is wider than a phone takes the focus"
    for _ in range(3):
        chromium.press("ArrowRight", 39)
    moved = "new Promise(done => setTimeout(() => done(document.activeElement.scrollLeft), 300))"
    assert chromium.evaluate(moved) > 0


def test_on_paper_nothing_is_cut_off(chromium: Browser, url: str) -> None:
    chromium.open(url, width=PAPER, dark=True, media="print")
    assert sizes(chromium, "html")[0][0] <= PAPER
    cut = [size for size in sizes(chromium, ".wide, pre") if size[0] > size[1] + 1]
    assert cut == []
    assert chromium.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.evaluate("document.querySelector('details pre').checkVisibility({contentVisibilityAuto: true})")
    assert chromium.pdf().startswith(b"%PDF")


def test_the_page_follows_the_readers_system(chromium: Browser, url: str) -> None:
    grounds: list[Any] = []
    for dark in (False, True):
        chromium.open(url, width=1280, dark=dark)
        grounds.append(chromium.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(21, 24, 28)"]
