"""The page in Debian's headless Chromium: on a phone and a desk, light and dark, and on paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.stages.report.page import render_report
from tests.stages.report.sample_report import of_a_line
from tests.testbed.chromium import ABSENT, PROGRAM, Browser, browser

pytestmark = [pytest.mark.integration, pytest.mark.skipif(PROGRAM is None, reason=ABSENT)]
PAPER = 718  # CSS pixels of A4 between margins of 1 cm
HIGHEST = 5000  # pixels, on a desk

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
OUTSIDE = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide, svg, pre'))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
CUT = """[...document.querySelectorAll('.wide, pre')].filter(e => e.checkVisibility())
  .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"""


def test_the_page_is_readable_and_runs_no_foreign_script(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    render_report(path, of_a_line())
    with browser(tmp_path / "profile", limit_s=600) as page:
        for width, dark in ((390, True), (1280, False)):
            page.open(path.as_uri(), width=width, dark=dark)
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width
            assert page.evaluate(OUTSIDE) == []
            assert [each for each in page.evaluate(CONTRASTS) if each[0] < 4.5] == []
            grounds = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert grounds == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
            top = page.evaluate("document.querySelector('#verdict').getBoundingClientRect().bottom")
            assert top < 500, "the verdict is on the first screen"
            _nothing_acted(page)
        assert page.evaluate("document.documentElement.scrollHeight") <= HIGHEST
        plots = page.evaluate("[...document.querySelectorAll('svg')].filter(e => e.checkVisibility()).length")
        assert plots == 3, "load, slices and trend; the other is folded"
        kinds = "[...document.querySelectorAll('.context')].filter(e => e.checkVisibility()).length"
        assert page.evaluate(kinds) == 4
        page.press("Tab", 9)
        assert page.evaluate("document.activeElement.className") == "skip"
        page.open(path.as_uri(), width=PAPER, dark=True, media="print")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= PAPER
        assert page.evaluate(CUT) == []
        assert page.pdf().startswith(b"%PDF")


def _nothing_acted(page: Browser) -> None:
    assert page.complaints == []
    assert [each for each in page.requested if not each.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.querySelectorAll('script, img, iframe').length") == 0
    assert "<script>" in page.evaluate("document.querySelector('.context').innerText")
    assert not any(mark in page.evaluate("document.body.innerText") for mark in ("\u202e", "\x1b"))
