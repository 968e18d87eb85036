"""The report in a real browser: headless Chromium, which may not reach anything but the page itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (requirements-dev.txt)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]
DESKTOP, PHONE = 1280, 390  # pixels
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # root has no sandbox
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, reported) -> Iterator:
    """Opens a page and waits for its charts; at the end nothing may have gone wrong, and nothing left the page."""
    faults, contexts = [], []

    def show(name: str, width: int = DESKTOP, **options: object):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda m: m.type in ("error", "warning") and faults.append(m.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        address = reported.page(name).as_uri()
        page.on("request", lambda r: r.url.startswith(("data:", address)) or faults.append(f"asked for {r.url}"))
        page.goto(address)
        page.wait_for_selector("html[data-drawn]", state="attached")
        return page

    yield show
    for context in contexts:
        context.close()
    assert faults == []


def size_of(page, selector: str) -> dict:
    return page.locator(selector).first.bounding_box()


def test_every_section_has_its_content(show):
    page = show("run")
    for name in ("settings", "curves", "retrieval-1", "clusters-1", "reconstructions-1", "map-1"):
        assert size_of(page, f"#{name}")["height"] > 100, name
    assert page.locator("#curves canvas").count() >= 8
    assert page.evaluate("[...document.images].filter(i => !i.hidden).every(i => i.complete && i.naturalWidth > 8)")
    assert page.evaluate("[...document.images].every(i => i.hidden || i.alt !== '')")
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"


def drawn_point(page) -> tuple[float, float]:
    """Where on the screen the first point of the map is."""
    page.locator("#scatter-1").scroll_into_view_if_needed()
    x, y = page.evaluate(
        """() => {
            const doc = Bokeh.documents.find(doc => doc.get_model_by_name("points"));
            const source = doc.get_model_by_name("points");
            const plot = doc.roots()[0];
            const view = Bokeh.index.get_by_id ? Bokeh.index.get_by_id(plot.id) : Bokeh.index[plot.id];
            const box = view.canvas_view.el.getBoundingClientRect();
            const inner = view.frame;
            return [box.x + inner.x_scale.compute(source.data.x[0]), box.y + inner.y_scale.compute(source.data.y[0])];
        }"""
    )
    return x, y


def test_a_point_shows_its_image_on_hover_and_when_picked(show):
    page = show("run")
    x, y = drawn_point(page)
    page.mouse.move(x - 30, y - 30)
    page.mouse.move(x, y, steps=4)
    tip = page.locator(".bk-Tooltip img, .bk-tooltip img").first
    tip.wait_for(state="visible")
    assert tip.get_attribute("src").startswith("data:image/webp") and tip.bounding_box()["width"] > 60
    page.mouse.click(x, y)
    picked = page.locator(".picked img")
    picked.wait_for(state="visible")
    assert picked.get_attribute("alt").startswith("image ")
    first = picked.get_attribute("src")
    page.get_by_role("button", name="Next").focus()
    page.keyboard.press("Enter")
    assert picked.get_attribute("src") != first


def test_a_tap_on_a_phone_picks_a_point(show):
    page = show("run", PHONE, has_touch=True, is_mobile=True)
    page.touchscreen.tap(*drawn_point(page))
    page.locator(".picked img").wait_for(state="visible")


@pytest.mark.parametrize("name", ["run", "two", "unlabelled"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_nothing_is_wider_than_the_screen(show, name, width):
    page = show(name, width, color_scheme="dark" if width == PHONE else "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        "w => [...document.querySelectorAll('section, figure, p, .plot')]"
        ".filter(e => e.getBoundingClientRect().right > w + 1).map(e => e.outerHTML.slice(0, 80))", width
    )  # fmt: skip
    assert wide == []


def test_colours_follow_the_system(show):
    page = show("run", color_scheme="dark")
    ticks = """[...Bokeh.documents[0].all_models].find(m => m.type === "LinearAxis").major_label_text_color"""
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor"), page.evaluate(ticks)
    page.emulate_media(color_scheme="light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark[0]
    page.wait_for_function(f"dark => ({ticks}) !== dark", arg=dark[1])  # charts are told with the next frame drawn


def test_names_and_settings_run_nothing(show):
    page = show("hostile")
    page.wait_for_timeout(200)
    assert page.title().startswith("Report: <img src=x")
    assert page.locator("h1").text_content().startswith("<img src=x")
    assert page.locator("img[src='x'], b").count() == 0
    assert "$$x$$" in page.locator("#settings").text_content()


def test_two_runs_lie_in_one_chart(show):
    page = show("two")
    lines = page.evaluate("[...Bokeh.documents[0].all_models].filter(m => m.type === 'Line').length")
    assert lines >= 2 and page.locator("#comparison").is_visible()
