"""What does a page say: in which characters, with which title, text and links?"""

from __future__ import annotations

import codecs
import random
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler

import pytest
from crawl_site import PAGE, Reply, Site, fetched, followed, refused, reply, retried, run

from executors.web import page as reading
from executors.web.fetch import Page
from executors.web.markup import Markup

CHINESE = "中文网页标题：人民日报社论与天气预报。今天全国大部分地区晴朗，南方有小雨，请注意添加衣服。"
TRADITIONAL = "繁體中文網頁標題：今天天氣晴朗，請大家注意身體健康，祝您購物愉快，歡迎光臨本網站。"
# What each says is long enough to be told from the others by a machine, as a page is.
TEXTS = {
    "utf-8": CHINESE,
    "gb2312": CHINESE,
    "gbk": CHINESE,
    "gb18030": CHINESE,
    "hz": CHINESE,
    "big5": TRADITIONAL,
    "big5-hkscs": TRADITIONAL,
    "euc-jp": "日本語のページです。今日はとても良い天気ですね。",
    "shift_jis": "日本語のページです。今日はとても良い天気ですね。",
    "iso-2022-jp": "日本語のページです。今日はとても良い天気ですね。",
    "euc-kr": "한국어 페이지입니다. 오늘은 날씨가 좋습니다.",
    "windows-1251": "Русская страница: сегодня хорошая погода",
    "koi8-r": "Русская страница: сегодня хорошая погода",
    "iso-8859-5": "Русская страница: сегодня хорошая погода",
    "windows-1250": "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "iso-8859-2": "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "windows-1252": "Größenänderung “für” 5 €",
    "iso-8859-1": "Größenänderung für alle",
    "iso-8859-15": "Größenänderung für 5 €",
    "windows-1253": "Ελληνική σελίδα για τον καιρό",
    "windows-1254": "Türkçe sayfa: bugün hava çok güzel, değil mi",
    "windows-1255": "דף בעברית על מזג האוויר",
    "windows-1256": "صفحة عربية عن الطقس",
    "windows-1257": "Lietuviškas puslapis apie orą",
    "windows-874": "หน้าเว็บภาษาไทย",
    "tis-620": "หน้าเว็บภาษาไทย",
    "windows-1258": "Trang web tiêng Viêt",
}
PYTHON_NAMES = {"windows-874": "cp874"}


def html(text: str, head: str = "") -> str:
    return f"<!doctype html><html><head>{head}<title>{text}</title></head><body><p>{text}</p></body></html>"


@pytest.mark.parametrize("label", TEXTS)
def test_a_page_is_read_in_the_charset_that_its_header_names(site: Site, label: str) -> None:
    site.pages["/x"] = reply(
        html(TEXTS[label]).encode(PYTHON_NAMES.get(label, label)), Content_Type=f"text/html; charset={label}"
    )
    assert fetched(site.url + "/x")["title"] == TEXTS[label]


@pytest.mark.parametrize("label", TEXTS)
@pytest.mark.parametrize(
    "meta", ['<meta charset="{}">', '<meta http-equiv=Content-Type content="text/html; charset={}">']
)
def test_a_page_is_read_in_the_charset_that_it_names_itself(site: Site, label: str, meta: str) -> None:
    body = html(TEXTS[label], meta.format(label)).encode(PYTHON_NAMES.get(label, label))
    site.pages["/x"] = reply(body, Content_Type="text/html")
    assert fetched(site.url + "/x")["title"] == TEXTS[label]


MARKS = [
    (b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"),
    (b"\xff\xfe\0\0", "utf-32-le"), (b"\0\0\xfe\xff", "utf-32-be"),
]  # fmt: skip


@pytest.mark.parametrize(("mark", "encoding"), MARKS)
def test_a_byte_order_mark_goes_before_every_name(site: Site, mark: bytes, encoding: str) -> None:
    site.pages["/x"] = reply(mark + html(CHINESE).encode(encoding), Content_Type="text/html; charset=gbk")
    assert fetched(site.url + "/x")["title"] == CHINESE


@pytest.mark.parametrize("label", ["gb18030", "big5", "utf-8", "euc-jp", "shift_jis", "euc-kr", "windows-1251"])
def test_a_page_that_names_no_charset_is_read_all_the_same(label: str) -> None:
    body = html(TEXTS[label] * 3).encode(label)
    assert TEXTS[label] in reading.decode(Page("http://x/", 200, {}, body))


def test_the_header_goes_before_the_page_and_nonsense_counts_for_nothing(site: Site) -> None:
    def title(body: bytes, kind: str) -> str:
        site.pages["/x"] = reply(body, Content_Type=kind)
        return str(fetched(site.url + "/x")["title"])

    assert title(html(CHINESE, '<meta charset="gbk">').encode(), "text/html; charset=utf-8") == CHINESE
    assert title(html(CHINESE, '<meta charset="gbk">').encode("gbk"), "text/html; charset=no-such") == CHINESE
    for label in ("base64", "idna", "zip", "utf-7", "undefined", "rot13", "x" * 500, "\0", "__builtins__"):
        assert title(html(CHINESE, f'<meta charset="{label}">').encode(), f"text/html; charset={label}") == CHINESE
    # Whoever can read this meta in single bytes knows better.
    assert title(html(CHINESE, '<meta charset="utf-16">').encode(), "text/html") == CHINESE
    assert (
        title(f'<?xml version="1.0" encoding="gbk"?>{html(CHINESE)}'.encode("gbk"), "application/xhtml+xml") == CHINESE
    )


def test_wrong_bytes_and_nul_make_a_result_that_can_be_sent(site: Site) -> None:
    site.pages["/x"] = reply(b"<title>a\0b\xff</title><a href='/\xff\0'>x</a><a href='http://[::1'>y</a>")
    assert fetched(site.url + "/x", follow={})["title"] == "a\ufffdb\ufffd"


def test_a_page_cut_through_a_character_stays_utf_8() -> None:
    body = html("文" * 100).encode()[:200]
    whole = Page("http://x/", 200, {}, body, is_truncated=True)
    assert reading.decode(whole).startswith("<!doctype html><html><head><title>文文")


@pytest.mark.parametrize(
    ("body", "title", "links"),
    [
        (b"<title>t</title><a href='/a'>a<![x[ <!DOCTYPE [ <a href='/b'>b</a> <b <i", "t", 1),
        (b"<TITLE>t</TITLE><A HREF=/a><a href='/b", "t", 1),
        (b"<title>t</title>" + b"<div>" * 20_000 + b"<a href=/a>", "t", 1),
        (b"<title>t</title><a href=/a" + b" x" * 20_000 + b">", "t", 1),
        (b"<title>t</title><!-- <a href=/no> --><a href=/a><!-- never closed <a href=/b>", "t", 1),
        (b"<title>t</title><script>'<a href=/no>'</script><style><a href=/no></style><a href=/a>", "t", 1),
        (b"<title>1</title><title>2</title><svg><title>3</title></svg><a href=/a>", "1", 1),
        (b"</title></script></p></p></body></html><title>t</title><a href=/a>", "t", 1),
        (b"<title>&#0;&#xD800;&#99999999999;&nosuch;t</title><a href='&#47;a'>", "\ufffd\ufffd\ufffd&nosuch;t", 1),
        (b"<" * 50_000 + b"<title>t</title>", "t", 0),
        (b"<html><head><script src=x /><title>t</title></head><a href=/a>", "t", 1),
        (
            b"<noscript><a href=/a>x</a></noscript><template><a href=/b></template><textarea><a href=/no></textarea><title>t</title>",
            "t",
            2,
        ),
        (b"<title>t</title><a href='/never closed><a href=/b>", "t", 0),
        (b"<title>t</title>" + b"".join(b"<a href=/%d>" % i for i in range(60_000)), "t", 50_000),
        (b"&" * 50_000, None, 0),
        (b"", None, 0),
    ],
)
def test_broken_html_gives_what_can_be_read(site: Site, body: bytes, title: str | None, links: int) -> None:
    site.pages["/x"] = reply(body)
    result = fetched(site.url + "/x")
    assert result["title"] == title
    assert result["links_found"] == links


@pytest.mark.timeout(240)  # what takes a time that grows with the square would take hours
@pytest.mark.parametrize("end", ["", ">", "'"])
def test_no_broken_page_takes_more_time_than_its_size(end: str) -> None:
    units = ["<", "<!--", "<!", "<![", "</", "</a", "<a ", "<a x='", '<a x="', "<a x=", "<?", "<!DOCTYPE [", "&#", "&", "<a", "&amp",
             "<script>", "<script></", "<title>", "</script", "<!-->", "<a/", "<a x y", "<!--x--", "<noscript>", "</template><noscript>",
             "<a href=x", '<a href="', "<p>x", "&#x1", "<style></styl", "< ", "\n", "<a b ", "<textarea></", "<base href="]  # fmt: skip
    for unit in units:
        Markup(unit * (150_000 // len(unit)) + end)
    for unit in (b"<!---->", b"<!--", b"<?xml", b" ", b"<meta ", b"<", b"charset="):
        headless = Page("http://x/", 200, {}, unit * 2_000)
        reading.is_html(headless)
        reading.decode(headless)


@pytest.mark.parametrize("unit", [b" x", b"<b>", b"<b x='>'>", b"< "])
def test_a_page_that_is_slow_to_read_ends_in_time_and_when_it_is_cancelled(site: Site, unit: bytes) -> None:
    site.pages["/x"] = reply(b"<a " + unit * (10 * 1024 * 1024 // len(unit) - 10))
    outcome = run(site.url + "/x", timeout_seconds=1)
    assert "took longer than 1 s" in retried(outcome) and outcome.error_type == "OutOfTime"
    sent = threading.Event()
    site.pages["/y"] = after(sent, site.pages["/x"])
    assert "cancelled" in refused(run(site.url + "/y", is_cancelled=sent.is_set))


def after(sent: threading.Event, answer: Reply) -> Reply:
    def then(handler: BaseHTTPRequestHandler) -> None:
        answer(handler)
        sent.set()

    return then


def test_links_that_are_slow_to_choose_from_end_in_time(site: Site) -> None:
    links = b"".join(b"<a href=/%d/%s>" % (i, b"/shop" * 60 + b"/" * 600) for i in range(2000))
    site.pages["/x"] = reply(links)
    assert "took longer than 1 s" in retried(
        run(site.url + "/x", timeout_seconds=1, follow={"deny": [r"/shop/.*/.*\.html"]})
    )


def test_what_html_parser_finds_on_a_well_formed_page_is_found_here() -> None:
    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.hrefs: list[str] = []
            self.text = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            hrefs = [(value or "").strip() for name, value in attrs if name == "href" and tag in ("a", "area")]
            self.hrefs += hrefs[:1]

        def handle_data(self, data: str) -> None:
            self.text += "".join(data.split())

    pieces = ['<a href="/{}">x</a>', "<a title='it''s' href='/{}&amp;y=1'>y</a>", "<A class=b HREF=/{}>z</A>", "<p id=a>text {} &lt;b&gt;</p>",
              '<img alt="<a href=/no>" src=x>', "<!-- <a href=/no{}> -->", "<br/>", '<a data-x=" href=" href="/{}">q</a>', "a < b & c &copy; {}",
              '<a\nhref = "/{}"\n>n</a>', "<area href=/{} />", "<?php x?>", '<a href="/{}" href="/no">2</a>', "<a name=x>no</a>", "<b></b >"]  # fmt: skip
    chance = random.Random(11)
    for _ in range(300):
        page = "<!doctype html><html><body>" + "".join(
            chance.choice(pieces).replace("{}", str(n)) for n in range(chance.randrange(30))
        )
        expected = Reader()
        expected.feed(page)
        expected.close()
        found = Markup(page)
        assert list(found.hrefs) == list(dict.fromkeys(expected.hrefs))
        assert found.text_length == len(expected.text)


def test_no_random_html_is_a_crash() -> None:
    pieces = ["<a href='", "/a", "'>", "<!--", "-->", "<![CDATA[", "]]>", "<!DOCTYPE", ">", "<", "</", "&#", "x", "<script>", "</script",
              '"', "=", "\0", "\ud800", "中", "<title>", "</title>", "<base href=", "//", "\\", "<?xml", "?>", "<svg/>", "\n"]  # fmt: skip
    chance = random.Random(3)
    for _ in range(3000):
        text = "".join(chance.choices(pieces, k=chance.randrange(1, 15)))
        reading.links_of(Markup(text), "http://example.com/")


def test_links_are_resolved_against_the_page_or_its_base(site: Site) -> None:
    site.pages["/dir/x"] = reply(
        b'<a href="../up">1</a><a href="?q">2</a><a href="//h.example/p">3</a><a href="">4</a>'
    )
    site.pages["/based"] = reply(b'<base href="/other/"><a href="x">1</a>')
    plain = run(site.url + "/dir/x", follow={"same_host": False})
    assert followed(plain) == [site.url + "/up", site.url + "/dir/x?q", "http://h.example/p"]
    assert followed(run(site.url + "/based", follow={})) == [site.url + "/other/x"]


def test_html_is_known_by_its_type_or_by_how_it_begins() -> None:
    def known(body: bytes, **headers: str) -> bool:
        return reading.is_html(Page("http://x/", 200, headers, body))

    assert known(b"", **{"Content-Type": "Text/HTML; charset=x"}) and known(
        b"", **{"Content-Type": "application/xhtml+xml"}
    )
    assert known(PAGE) and known(codecs.BOM_UTF8 + PAGE) and known(b"<!-- c --><?xml version='1.0'?><html>")
    assert not known(PAGE, **{"Content-Type": "text/plain"}) and not known(b"%PDF-1.7 <html>") and not known(b"")
