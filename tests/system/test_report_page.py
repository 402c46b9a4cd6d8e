"""The report in Debian's Chromium, on a desktop and on a phone: no error, no request, nothing wider than the screen."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from services.report import build_report, render_page
from tests.system.conftest import require
from tests.unit.report_example import HOSTILE, example

pytestmark = pytest.mark.system

_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require("chromium"), args=_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = example()
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(build_report(**run.arguments()), run.reports, run.histories), "utf-8")
    return path.as_uri()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_page_draws_without_errors_requests_or_overflow(
    browser: Browser, page_url: str, tmp_path: Path, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_url)
    expect(page.locator(".plot .scatterlayer")).to_have_count(8)
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")

    assert complaints == []
    assert requests == [page_url]
    assert page.locator(".plot").count() == 8
    assert page.locator(".plot path.js-line").count() > 8
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    too_wide = "[...document.querySelectorAll('.plot')].filter(plot => plot.getBoundingClientRect().right > innerWidth)"
    assert page.evaluate(f"{too_wide}.length") == 0
    assert page.get_by_text(HOSTILE, exact=False).count() > 0
    page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
    context.close()


def test_figures_follow_the_screen_from_light_to_dark(browser: Browser, page_url: str) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto(page_url)
    tick = page.locator("#fvu .xtick text").first
    light = tick.evaluate("element => getComputedStyle(element).fill")
    page.emulate_media(color_scheme="dark")
    expect(tick).not_to_have_css("fill", light)
    page.close()
