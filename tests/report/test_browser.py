"""The report in a real browser: it loads nothing, fits every screen, can be read in both themes, and is quick."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from infctx.report import write_report
from tests.report.browser import Browser, find_browser

LOWEST_CONTRAST = 4.5

# Of every element with text of its own: the contrast of its colour with what lies behind it; of curves likewise.
# Source: WCAG 2.2, relative luminance and contrast ratio.
CONTRASTS = """(() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length && (c.length < 4 || c[3] > 0)) return c;
    }
    return [255, 255, 255];
  };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const style = getComputedStyle(e);
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (own && !(e instanceof SVGElement)) found.push([ratio(parse(style.color), behind(e)), e.tagName, e.className]);
    if (e.matches('path.line:not(.faint), path.mark'))
      found.push([ratio(parse(style.stroke), behind(e)), 'path', e.getAttribute('class')]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()"""

TOO_WIDE = """[...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('.wide') || e.closest('svg') || e.matches('.skip')) return false;
  const box = e.getBoundingClientRect();
  return box.width && (box.right > innerWidth + .5 || box.left < -.5);
}).map(e => e.tagName + '.' + e.className)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    with Browser(path, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(make_run: Any) -> Path:
    return write_report(make_run())


@pytest.mark.parametrize("dark", [False, True])
def test_everything_can_be_read_in_both_themes(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    back = browser.value("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    # Closed parts, too.
    browser.value("document.querySelectorAll('details').forEach(e => { e.open = true })")
    contrasts = browser.value(CONTRASTS)
    assert len(contrasts) > 300
    assert contrasts[0][0] >= LOWEST_CONTRAST, contrasts[:5]


@pytest.mark.parametrize("width", [320, 360, 768, 1600])
def test_nothing_is_wider_than_the_screen(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    browser.value("document.querySelectorAll('details').forEach(e => { e.open = true })")
    assert browser.value("innerWidth") == width
    assert browser.value(TOO_WIDE) == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    # What is written beside the axes stands side by side and not on each other.
    crowded = browser.value("""[...document.querySelectorAll('.places')].filter(axis => {
      const boxes = [...axis.children].map(e => e.getBoundingClientRect()).filter(b => b.width);
      return boxes.some((box, i) => i && box.left < boxes[i - 1].right + 8);
    }).map(e => e.textContent)""")
    assert crowded == []


def test_it_loads_nothing_and_complains_of_nothing(browser: Browser, page: Path) -> None:
    browser.open(page)
    asked = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked == [page.as_uri()]
    complaints = [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert complaints == []
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.images.length") == 0


def test_it_is_small_and_quick(browser: Browser, page: Path) -> None:
    assert page.stat().st_size < 300_000
    browser.open(page)
    times = browser.value(
        "(({loadEventEnd, domContentLoadedEventEnd}) => [domContentLoadedEventEnd, loadEventEnd])"
        "(performance.getEntriesByType('navigation')[0])"
    )
    # Half a second on the slowest machine that runs this, some tens of milliseconds elsewhere.
    assert times[-1] < 2000, times


def test_charts_are_drawn_and_described(browser: Browser, page: Path) -> None:
    browser.open(page)
    charts = browser.value("""[...document.querySelectorAll('svg.plot')].map(svg => {
      const box = svg.getBoundingClientRect();
      const inked = [...svg.querySelectorAll('path.line')].filter(path => path.getBBox().width > 900);
      return [svg.querySelector('title').textContent, svg.querySelector('desc').textContent, box.height, inked.length];
    })""")
    assert len(charts) == 9
    for title, description, height, inked in charts:
        assert title
        assert len(description) > 20
        assert height >= 150
        assert inked >= 1
    tree = browser.ask("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in tree if node.get("role", {}).get("value") in ("image", "img")]
    named = {node["name"]["value"] for node in images if node.get("name", {}).get("value")}
    assert {title for title, *_ in charts} <= named


def test_curves_differ_by_more_than_their_colour(browser: Browser, page: Path) -> None:
    browser.open(page)
    dashes = browser.value("""[...document.querySelectorAll('svg.plot')].map(svg =>
      [...svg.querySelectorAll('path.line')].map(p => {
        const s = getComputedStyle(p); return s.strokeDasharray + '/' + s.strokeWidth; }))""")
    assert max(map(len, dashes)) == 3
    assert all(len(set(of_chart)) == len(of_chart) for of_chart in dashes), dashes


def test_headings_landmarks_and_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    levels = browser.value("[...document.querySelectorAll('h1,h2,h3,h4')].map(e => +e.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert (
        browser.value("['header', 'nav', 'main', 'footer'].map(name => document.querySelectorAll(name).length)")
        == [1] * 4
    )
    ids = browser.value("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    targets = browser.value("[...document.querySelectorAll('a')].map(e => e.getAttribute('href').slice(1))")
    assert set(targets) <= set(ids)
    # The first stop of the tab key leads past the links, and the tables open with the keyboard alone.
    for kind in ("keyDown", "keyUp"):
        browser.ask("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert browser.value("document.activeElement.className") == "skip"
    assert browser.value("document.activeElement.getBoundingClientRect().left >= 0")


def test_on_paper_too(browser: Browser, page: Path) -> None:
    browser.open(page, media="print", width=794)
    assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.value(TOO_WIDE) == []
    assert len(browser.ask("Page.printToPDF")["data"]) > 10_000
