"""Which regular expressions may a task bring, and can one of them hold the device up?"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from crawl_site import refused, run

from executors.web.patterns import searcher

ACCEPTED = (
    "", ".*", ".*foo.*", ".*foo.*bar.*", "foo.*bar.*baz", "/en/", r"\.zip$", r"^https://[^/]+/p/\d+", "(?:jpg|png|gif)$", r".*\.pdf",
    "/(a|b)/", "/[^/]+/[^/]+/[^/]+$", r"\.(jpe?g|png|gif)(\?.*)?$", r"^https?://(www\.)?example\.com/", r"(?i)\.PDF$",
    r"/p/\d{1,10}-[\w-]+\.html$", r".*/product/.*\.html", "/category/.*/page/.*", r"/shop/.*/.*\.html", r"/(?!login|logout)\w+",
    r"[?&]page=\d+(&|$)", r"/\d{4}/\d{2}/", "(?:ab|cd)+x", "(?:/a)*$", r"^.*/a/.*\.pdf$", "/(?:en|de|fr)(?:-[a-z]{2})?/", r"\bnews\b",
    r"^[\w-]+-[\w-]+\.html", r"(?:[a-z]+-)?\d+", "^(?!.*(login|logout)).*$", r"/user/\d+(/\w+)?/?$", r"(?P<id>\d+)/(?P=id)",
)  # fmt: skip
REFUSED = (
    r"/(a|aa)+$", "(a+)+", "(a+)+$", "(?:ab|ab)+", "(ab|ab)+c", ".*.*.*.*", "(.*)*", "(?:a?){30}a{30}", "a?" * 30 + "a" * 30,
    r"(\w+\s?)+$", "(?:[ab]c|[ac]c)+x", r".*a.*b.*c.*d", r"\w+\d+\w+x", "(a{0,19}){0,19}b", "(a|a?)+", r"([a-z]+)*\d",
    "(?:(?:a|ab){1,19}){1,19}x", "^(([a-z])+.)+[A-Z]([a-z])+$", "(?=(a+)+b)", "(?!(a|aa)+$)", r"(.*)\1(.*)\2", "(?:a*|b)+c",
    "(" * 30 + "a" + "{0,19})" * 30, "x" * 2001,
)  # fmt: skip
# As much as is accepted, each with the URL that is worst for it.
WORST = {
    "foo.*bar.*baz": "foo" * 113 + "bar" * 113 + "b" * 340,
    "a{0,19}.*[bc]": "a" * 1024,
    "^.*(?:a?){3}[ab]*[bc]": "a" * 1024,
    "abcd.*efgh.*[xy]": "abcd" * 120 + "efgh" * 120,
    "abc.*def.*[xy]": "abc" * 170 + "def" * 170,
    r"/shop/.*/.*\.html": "/shop" * 60 + "/" * 720,
    "(?:a?){7}c": "a" * 1024,
    ".*a.*[bc]": "a" * 1024,
    r"^[\w-]+-[\w-]+\.html": "-" * 1024,
    "(?:(?:ab|cd)e?)+x": "abcd" * 256,
}


@pytest.mark.parametrize("pattern", ACCEPTED)
def test_an_ordinary_pattern_is_accepted(pattern: str) -> None:
    searcher(pattern)


@pytest.mark.parametrize("pattern", REFUSED)
def test_a_pattern_that_could_hold_the_device_up_is_refused_before_anything_is_fetched(pattern: str) -> None:
    message = refused(run("http://127.0.0.1:1/", follow={"deny": ["ok", pattern]}))
    assert "task_data.follow.deny[1]" in message and repr(pattern)[:90] in message and "Begin it with ^" in message


@pytest.mark.timeout(240)
@pytest.mark.parametrize("pattern", WORST)
def test_the_worst_that_is_accepted_takes_well_under_a_second(pattern: str) -> None:
    finds = searcher(pattern)
    seconds = []
    for _ in range(3):  # whatever else the machine does, one of them is undisturbed
        started = time.thread_time()
        assert not finds(WORST[pattern])
        seconds.append(time.thread_time() - started)
    assert min(seconds) < 0.6


def test_what_a_pattern_finds_stays_what_re_search_finds() -> None:
    assert searcher(r".*\.pdf")("http://a/x.pdf") and searcher("x")("http://a/x") and searcher(".*?x")("http://a/x")
    assert not searcher(r".*\.pdf")("http://a/x") and not searcher("^x")("http://a/x")


def test_patterns_are_read_without_a_warning_on_the_screen() -> None:
    code = "from executors.web.patterns import searcher; searcher('a')"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
