"""A real master as its own process, and the machine's Chromium to look at it. Only loopback."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from farm import Master, Program, farm

PATIENCE = 60.0  # seconds until something that should take less than one is called broken
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def launch_master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Master]]:
    """Starts a master that lives until the end of the tests."""
    with farm() as started:

        def launch(**settings: Any) -> Master:
            master = Master(tmp_path_factory.mktemp("master"), **{"dispatch_interval": 1, **settings})
            started.append(master)
            return master

        yield launch


@pytest.fixture
def start_master(programs: list[Program], tmp_path: Path) -> Callable[..., Master]:
    """Starts a master that lives as long as the test."""

    def start(**settings: Any) -> Master:
        master = Master(tmp_path, **{"dispatch_interval": 1, **settings})
        programs.append(master)
        return master

    return start


@pytest.fixture
def master(start_master: Callable[..., Master]) -> Master:
    return start_master()


@pytest.fixture
def dashboard_url(master: Master) -> str:
    return master.url + "/"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium); the dashboard stays untested here")
    playwright = pytest.importorskip("playwright.sync_api", reason="the playwright package is in requirements-dev.txt")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


class Tab:
    """One page in a browser of its own, and all that it complained about or asked of others."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.context = browser.new_context(**{"locale": "en-GB", "viewport": {"width": 1280, "height": 900}, **options})
        self.context.set_default_timeout(PATIENCE * 1000)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.forgiven: tuple[str, ...] = ()
        self.asked: set[str] = set()
        self.page.on("console", lambda message: message.type in ("error", "warning") and self._complain(message.text))
        self.page.on("pageerror", lambda error: self._complain(str(error)))
        self.page.on("request", lambda request: self.asked.add(urlsplit(request.url).netloc))

    def _complain(self, text: str) -> None:
        self.complaints.append(text)

    def sign_in(self, url: str, cookies: dict[str, str]) -> None:
        """As somebody whose browser has these cookies of that master."""
        self.context.add_cookies([{"name": name, "value": value, "url": url} for name, value in cookies.items()])

    def close(self) -> None:
        own = urlsplit(self.page.url).netloc
        self.context.close()
        self._judge(own)

    def empty(self) -> None:
        """As it was when it was new, but for the scripts that the browser keeps compiled."""
        own = urlsplit(self.page.url).netloc
        self.page.mouse.move(0, 0)
        self.page.evaluate("localStorage.clear(); sessionStorage.clear()")
        self.page.goto("about:blank")
        self.context.clear_cookies()
        self._judge(own)

    def _judge(self, own: str) -> None:
        """Fails if the page complained, or asked anybody but its own master for anything."""
        unforgiven = [text for text in self.complaints if not any(part in text for part in self.forgiven)]
        asked = set(self.asked)
        self.complaints.clear()
        self.asked.clear()
        assert unforgiven == [], "the console is not clean"
        assert asked == {own}, "the page asked somebody else"


@pytest.fixture(scope="module")
def stay(chromium: Any) -> Iterator[Callable[..., Tab]]:
    """Opens a tab that stays until the end of the file."""
    tabs: list[Tab] = []

    def open_one(*, forgive: tuple[str, ...] = ()) -> Tab:
        tab = Tab(chromium)
        tab.forgiven = forgive
        tabs.append(tab)
        return tab

    yield open_one
    for tab in tabs:
        tab.close()


@pytest.fixture(scope="session")
def free_tabs() -> list[Tab]:
    """Emptied ones: to open a new one costs as much as most tests do with it."""
    return []


@pytest.fixture
def open_tab(chromium: Any, free_tabs: list[Tab]) -> Iterator[Callable[..., Tab]]:
    tabs: list[tuple[Tab, bool]] = []

    def open_one(
        url: str,
        *,
        forgive: tuple[str, ...] = (),
        own: bool = False,
        cookies: dict[str, str] | None = None,
        **options: Any,
    ) -> Tab:
        """`own` is for a test that changes the page itself: its size, clock, permissions, routes or listeners."""
        own = own or bool(options) or url == "about:blank"
        tab = free_tabs.pop() if free_tabs and not own else Tab(chromium, **options)
        tab.forgiven = forgive
        tabs.append((tab, own))
        if cookies:
            tab.sign_in(url, cookies)
        tab.page.goto(url)
        return tab

    yield open_one
    for tab, own in tabs:
        if own:
            tab.close()
        else:
            tab.empty()
            free_tabs.append(tab)
