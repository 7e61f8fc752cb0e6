"""A Chromium that is driven, and a report to look at."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import report_store
from playwright.sync_api import Browser, Page, sync_playwright

from gradflow import report
from gradflow.store import load_runs

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update"]  # fmt: skip
SIZES = {"desk": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert path, "Chromium is missing: apt-get install chromium, or name one in CHROMIUM"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with every kind of run, and its report beside it."""
    place = tmp_path_factory.mktemp("browser")
    report_store.write_store(place / "runs")
    report.write_report(load_runs(place / "runs"), place / "report")
    return place


class Visit:
    """An open page, and what went wrong or out of it."""

    def __init__(self, browser: Browser, url: str, size: str = "desk", theme: str = "light"):
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=theme,  # type: ignore[arg-type]
        )
        self.page: Page = self.context.new_page()
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.url = url
        self.page.goto(url)
        self.page.wait_for_selector("html[data-ready]", state="attached")


@pytest.fixture
def visit(chromium: Browser, place: Path) -> Iterator[type[Visit]]:
    """Opens the report; every visit must have been without errors and without any request."""
    made: list[Visit] = []

    def open_page(url: str = "", **options: str) -> Visit:
        made.append(Visit(chromium, url or (place / "report" / "index.html").as_uri(), **options))
        return made[-1]

    yield open_page  # type: ignore[misc]
    for one in made:
        one.context.close()
        assert one.errors == []
        assert [url for url in one.asked if not url.startswith(("data:", "blob:", one.url))] == []
