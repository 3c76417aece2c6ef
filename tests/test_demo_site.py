"""Is the demo's site whole, the same every time, and served as it is?"""

from __future__ import annotations

import re
import socket
import threading
import urllib.error
import urllib.request
from html import unescape
from pathlib import Path
from urllib.parse import urldefrag, urljoin

import pytest

import demo_site

SMALL = ("json", "queue", "heapq", "wsgiref", "no_such_module_anywhere")


def expected_site(site: Path) -> tuple[set[str], dict[str, set[str]]]:
    """Pages that can be reached from index.html, and dead links with the pages that link them: by the files alone."""
    base, reachable, dead, waiting = "http://site/", set(), {}, ["index.html"]
    while waiting:
        name = waiting.pop()
        if name in reachable:
            continue
        reachable.add(name)
        for href in re.findall(r'<a\s[^>]*?href="([^"]*)"', (site / name).read_text(encoding="utf-8"), re.IGNORECASE):
            url = urldefrag(urljoin(base + name, unescape(href))).url
            if not url.startswith(base):
                continue
            target = url.removeprefix(base) or "index.html"
            if (site / target).is_file():
                waiting.append(target)
            else:
                dead.setdefault(target, set()).add(name)
    return reachable, dead


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def test_the_site_is_kept_whole_for_the_next_time_with_progress_the_first_time(tmp_path: Path) -> None:
    said: list[str] = []
    site = demo_site.build_site(tmp_path, said.append, modules=SMALL)
    assert re.fullmatch(r"rendering the site: (\d+) of \1 pages", said[-1])
    assert [path.name for path in site.parent.iterdir()] == [site.name]
    again: list[str] = []
    assert demo_site.build_site(site.parent, again.append, modules=SMALL) == site
    assert again == []


def test_an_interrupted_rendering_leaves_no_half_site(tmp_path: Path) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_site.build_site(tmp_path, interrupt, modules=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_stop_during_the_rendering_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(demo_site.Stopped):
        demo_site.build_site(tmp_path, modules=SMALL, stop=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_site_server_keeps_its_port_and_serves_nothing_but_the_site(folder: Path) -> None:
    site = demo_site.build_site(folder, modules=SMALL)
    with demo_site.serve_site(site, folder) as first:
        assert b"json.html" in urllib.request.urlopen(first, timeout=60).read()
        for path in ("no.html", "../port", "%2e%2e/port"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(first + path, timeout=60)
    with demo_site.serve_site(site, folder) as second:
        assert second == first


def test_a_taken_port_is_said_and_another_one_is_used(folder: Path) -> None:
    site = demo_site.build_site(folder, modules=SMALL)
    said: list[str] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (folder / "port").write_text(f"{port}\n")
        with demo_site.serve_site(site, folder, said.append) as url:
            assert f":{port}/" not in url
    assert f"port {port} of the last time is taken" in said[0]


@pytest.mark.parametrize("memory", ["", "x", "-1", "99999", "80", "1" * 5000])
def test_a_senseless_port_memory_means_any_port(tmp_path: Path, memory: str) -> None:
    (tmp_path / "port").write_text(memory)
    assert demo_site.read_port(tmp_path / "port") == 0
