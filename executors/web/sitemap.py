"""Which pages does a sitemap name? https://www.sitemaps.org/protocol.html

XML (urlset and sitemapindex), plain text with a URL a line, either of them gzipped. expat reads the XML, and a document
that declares entities is refused at the declaration, so nothing is ever expanded. Broken XML gives the URLs up to
there. 50 MiB unpacked at most, as the protocol has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from executors.task_executor import DoNotRetry
from executors.web.fetch import MAX_RATIO, RATIO_COUNTS_FROM_BYTES, Page
from executors.web.page import decode, is_html
from executors.web.unpack import GZIP_MAGIC, inflated
from executors.web.urls import fetched_form

MAX_SITEMAP_BYTES = 50 * 1024 * 1024
MAX_ENTRIES = 50_000
MAX_LOC_CHARACTERS = 4096
FEED_BYTES = 64 * 1024


@dataclass
class Sitemap:
    """Distinct URLs as they are fetched, in order."""

    pages: list[str] = field(default_factory=list)
    sitemaps: list[str] = field(default_factory=list)
    is_truncated: bool = False


def read_sitemap(page: Page) -> Sitemap:
    """What a fetched sitemap names. Raises DoNotRetry for what is none."""
    body = gunzipped(page) if page.body.startswith(GZIP_MAGIC) else page.body
    start = body[:1024].lstrip(b"\xef\xbb\xbf\xff\xfe\x00 \t\r\n")
    if start.startswith((b"<", b"\x00<")):
        sitemap = read_xml(page, body)
    else:
        lines = decode(Page(page.url, page.status, page.headers, body)).split()
        sitemap = Sitemap(pages=known_urls(lines[:MAX_ENTRIES]), is_truncated=len(lines) > MAX_ENTRIES)
    sitemap.is_truncated = sitemap.is_truncated or page.is_truncated or len(body) > MAX_SITEMAP_BYTES
    if not (sitemap.pages or sitemap.sitemaps) and is_html(page):
        raise DoNotRetry(f"{page.url} is an HTML page and no sitemap: write the sitemap's URL as task_data.sitemap")
    return sitemap


def gunzipped(page: Page) -> bytes:
    body = bytearray()
    for piece in inflated(iter((page.body,)), page.url, is_gzip=True):
        body += piece
        if len(body) > max(RATIO_COUNTS_FROM_BYTES, MAX_RATIO * len(page.body)):
            raise DoNotRetry(f"{page.url} unpacks to more than {MAX_RATIO} times its size: a bomb, it is not read")
        if len(body) > MAX_SITEMAP_BYTES:
            break
    return bytes(body)


class _Reader:
    """Collects the <loc> of each <url> and <sitemap>; other namespaces' loc (image:loc) are none of them."""

    def __init__(self, url: str):
        self.url = url
        self.pages: list[str] = []
        self.sitemaps: list[str] = []
        self._path: list[str] = []
        self._text: list[str] = []
        self._length = 0

    def start(self, name: str, attributes: object) -> None:
        if len(self._path) < 8:
            self._path.append(name)
        else:
            raise DoNotRetry(f"{self.url} is nested too deep for a sitemap")
        self._text, self._length = [], 0

    def text(self, text: str) -> None:
        if self._path[-1:] == ["loc"] and self._length <= MAX_LOC_CHARACTERS:
            self._text.append(text)
            self._length += len(text)

    def end(self, name: str) -> None:
        if self._path[-2:] == ["url", "loc"]:
            self.pages.append("".join(self._text))
        elif self._path[-2:] == ["sitemap", "loc"]:
            self.sitemaps.append("".join(self._text))
        self._path[-1:] = []

    def refuse_entity(self, *_: object) -> None:
        raise DoNotRetry(f"{self.url} declares XML entities, which no sitemap needs: it is not read")


def read_xml(page: Page, body: bytes) -> Sitemap:
    reader = _Reader(page.url)
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    parser.CharacterDataHandler = reader.text
    parser.EntityDeclHandler = reader.refuse_entity
    is_broken = False
    try:
        for at in range(0, min(len(body), MAX_SITEMAP_BYTES), FEED_BYTES):
            parser.Parse(body[at : at + FEED_BYTES], False)
            if len(reader.pages) + len(reader.sitemaps) > MAX_ENTRIES:
                break
        else:
            parser.Parse(b"", True)
    except (expat.ExpatError, ValueError, LookupError):
        is_broken = True
    pages, sitemaps = reader.pages[:MAX_ENTRIES], reader.sitemaps[:MAX_ENTRIES]
    is_truncated = is_broken or len(reader.pages) + len(reader.sitemaps) > MAX_ENTRIES
    return Sitemap(known_urls(pages), known_urls(sitemaps), is_truncated)


def known_urls(texts: list[str]) -> list[str]:
    """Distinct http(s) URLs in order; a sitemap's are absolute."""

    def urls() -> Iterator[str]:
        for text in texts:
            url = fetched_form(text.strip())
            if url is not None:
                yield url

    return list(dict.fromkeys(urls()))
