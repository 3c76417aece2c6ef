"""How is a URL written, to be fetched, and to be known again? Compared with w3lib over a large corpus."""

from __future__ import annotations

import random

import pytest
from w3lib.url import canonicalize_url

from executors.web.urls import canonical, fetched_form


@pytest.mark.parametrize(
    ("url", "form"),
    [
        ("HTTP://Example.COM", "http://example.com/"),
        ("http://example.com:80/a", "http://example.com/a"),
        ("https://example.com:443/", "https://example.com/"),
        ("http://example.com:8080/", "http://example.com:8080/"),
        ("http://example.com/a#part", "http://example.com/a"),
        ("http://example.com/a/./b/../c", "http://example.com/a/c"),
        ("http://example.com/../../a/..", "http://example.com/"),
        ("http://example.com/a/b/..", "http://example.com/a/"),
        ("http://example.com/a//b/", "http://example.com/a//b/"),
        ("http://example.com?x=1", "http://example.com/?x=1"),
        ("http://example.com/?b=2&a=1", "http://example.com/?b=2&a=1"),
        ("http://example.com/?", "http://example.com/"),
        ("http://example.com/a b/中?q=中 文", "http://example.com/a%20b/%E4%B8%AD?q=%E4%B8%AD%20%E6%96%87"),
        ("http://example.com/%7euser%2f?100%", "http://example.com/%7Euser%2F?100%25"),
        ("http://user:secret@example.com/", "http://example.com/"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://[::1]:8000/x", "http://[::1]:8000/x"),
        ("http://[0:0::0:1]/", "http://[::1]/"),
        ("http://[::ffff:1.2.3.4]/", "http://1.2.3.4/"),
        ("http://１２７.０.０.１/", "http://127.0.0.1/"),
        ("http://exa\nmple.com/a\tb", "http://example.com/ab"),
        ("http://a.example\\@b.example/x\\y?z\\", "http://a.example/@b.example/x/y?z%5C"),
        ("http://example.com/\ud800", None),
        ("http://example.com:0x50/", None),
        ("http://example.com:99999/", None),
        ("http://[::1", None),
        ("http://[::1%25eth0]/", None),
        ("http://./", None),
        ("http://a b/", None),
        ("//example.com/", None),
        ("data:text/html,x", None),
        ("http://example.com/" + "x" * 1100, None),
    ],
)
def test_a_url_is_fetched_in_one_spelling(url: str, form: str | None) -> None:
    assert fetched_form(url) == form
    if form is not None:
        assert fetched_form(form) == form


@pytest.mark.parametrize(
    ("url", "known_as"),
    [
        ("http://example.com/?b=2&a=1&b=1", "http://example.com/?a=1&b=1&b=2"),
        ("http://example.com/?q=a%20b", "http://example.com/?q=a+b"),
        ("http://example.com/%7Euser/%41", "http://example.com/~user/A"),
        ("http://example.com/a%2Fb", "http://example.com/a%2Fb"),
        ("http://example.com/a/%2E%2E/b", "http://example.com/b"),
        ("http://example.com/?a", "http://example.com/?a="),
        ("http://example.com/plain/page.html", "http://example.com/plain/page.html"),
    ],
)
def test_spellings_of_one_page_are_known_as_one(url: str, known_as: str) -> None:
    assert canonical(url) == known_as
    assert canonicalize_url(url) == known_as


def corpus(count: int) -> list[str]:
    """URLs of real shapes and of no shape at all, the same ones in each run."""
    chance = random.Random(5)
    hosts = ("http://example.com", "https://EXAMPLE.com:443", "http://h:8080", "http://[::0:1]", "http://[2001:DB8::1]:81",
             "http://bücher.example", "http://u:p@x.org", "http://x.org.", "http://１２７.０.０.１", "http://0x7f.1")  # fmt: skip
    pieces = ("/", "a", "b", "..", ".", "/../", "/./", "%2e", "%2F", "%2f", "%25", "%", "%zz", "%C3%A9", "é", "中", " ", "+", "?",
              "&", "=", "a=1", "b=2", "a=", "=x", ";", ";p=1", "#", "f", "|", "[", "]", "'", '"', "~", "*", "(", ")", "!", "$",
              ",", ":", "@", "\\", "<", "^", "{", "`", "%00", "\x7f", "%7E", "%7e", "%ff", "index.html", "//", "&&", "%26",
              "%3D", "%3b", "%3F", "%2B", "%20", "%5B", "%7C", "utm_source=x", "ID=9", "页面=1", "-", "_", "\u3000")  # fmt: skip
    return [
        chance.choice(hosts)
        + ("/" if chance.random() < 0.9 else "")
        + "".join(chance.choices(pieces, k=chance.randrange(9)))
        for _ in range(count)
    ]


def test_every_device_knows_a_page_by_the_name_that_w3lib_gives_it() -> None:
    forms = {form for url in corpus(20_000) if (form := fetched_form(url)) is not None}
    assert len(forms) > 12_000
    different = [
        (form, canonical(form), canonicalize_url(form)) for form in forms if canonical(form) != canonicalize_url(form)
    ]
    assert different == []


def test_forms_and_names_stay_as_they_are() -> None:
    for url in corpus(10_000):
        form = fetched_form(url)
        if form is not None:
            assert fetched_form(form) == form
            assert canonical(fetched_form(canonical(form)) or "") == canonical(form)


def test_a_link_is_resolved_against_its_page() -> None:
    base = "http://example.com/dir/page?x=1"
    links = {
        "y": "/dir/y",
        "/z": "/z",
        "?q=1": "/dir/page?q=1",
        "": "/dir/page?x=1",
        "../../..": "/",
        "./a/../b": "/dir/b",
    }
    for link, path in links.items():
        assert fetched_form(link, base) == f"http://example.com{path}"
    assert fetched_form("//other.example", base) == "http://other.example/"
    assert fetched_form("mailto:a@b", base) is None
