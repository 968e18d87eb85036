"""The report in headless Chromium, which may reach nothing but the page itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]
DESKTOP = 1280  # pixels
PHONE = 390  # pixels
PLACE_OF_FIRST_POINT = """() => {
    const doc = Bokeh.documents.find(doc => doc.get_model_by_name("points"));
    const data = doc.get_model_by_name("points").data;
    const {id} = doc.roots()[0];
    const view = Bokeh.index.get_by_id ? Bokeh.index.get_by_id(id) : Bokeh.index[id];
    const box = view.canvas_view.el.getBoundingClientRect();
    const {x_scale, y_scale} = view.frame;
    return [box.x + x_scale.compute(data.x[0]), box.y + y_scale.compute(data.y[0])];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has no sandbox
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, reported) -> Iterator:
    """Open pages and wait for their charts; fail if they log a fault or ask for anything."""
    faults = []
    contexts = []

    def show(name: str, width: int = DESKTOP, **options: object):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("request", lambda request: faults.append(f"request: {request.url[:200]}"))
        page.goto(reported.page(name).as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached")
        return page

    yield show
    for context in contexts:
        context.close()
    harmless = ("log:", "info:", "debug:", "request: data:", "request: file:")
    assert [fault for fault in faults if not fault.startswith(harmless)] == []


def test_every_section_has_its_content(show):
    page = show("run")
    page.evaluate("document.querySelector('#settings details').open = true")
    for name in ("settings", "curves", "retrieval-1", "clusters-1", "reconstructions-1", "map-1"):
        assert page.locator(f"#{name}").bounding_box()["height"] > 100, name
    assert page.locator("#curves canvas").count() >= 4
    visible = "[...document.images].filter(i => !i.hidden)"
    assert page.evaluate(f"{visible}.every(i => i.complete && i.naturalWidth > 8 && i.alt)")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"


def place_of_first_point(page) -> tuple[float, float]:
    """Scroll to the map, and return where on the screen its first point is."""
    page.locator("#scatter-1").scroll_into_view_if_needed()
    return page.evaluate(PLACE_OF_FIRST_POINT)


def test_a_point_shows_its_image_on_hover_and_when_picked(show):
    page = show("run")
    x, y = place_of_first_point(page)
    page.mouse.move(x - 30, y - 30)
    page.mouse.move(x, y, steps=4)
    tip = page.locator(".bk-Tooltip img, .bk-tooltip img").first
    tip.wait_for(state="visible")
    assert tip.bounding_box()["width"] > 60
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
    page.touchscreen.tap(*place_of_first_point(page))
    page.locator(".picked img").wait_for(state="visible")


@pytest.mark.parametrize("name", ["run", "two", "unlabeled"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_nothing_is_wider_than_the_screen(show, name, width):
    page = show(name, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    parts = page.locator("section, figure, p, .plot")
    rights = parts.evaluate_all("all => all.map(e => e.getBoundingClientRect().right)")
    assert max(rights) <= width + 1


def test_colors_follow_the_system(show):
    page = show("run", color_scheme="dark")
    axis = "[...Bokeh.documents[0].all_models].find(m => m.type === 'LinearAxis')"
    dark = page.evaluate(f"{axis}.major_label_text_color")
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"dark => {axis}.major_label_text_color !== dark", arg=dark)


def test_names_and_settings_run_nothing(show):
    page = show("hostile")
    page.wait_for_timeout(200)
    assert page.title().startswith("Report: <img src=x")
    assert page.locator("img[src='x'], b").count() == 0
    assert "$$x$$" in page.locator("#settings").text_content()
