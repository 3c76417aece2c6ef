"""What does a page say: in which characters, with which title, text and links?

Read by the same code on every device, so that a page gives the same links everywhere, whatever is installed.
"""

from __future__ import annotations

import codecs
import re
from typing import Optional

from executors.web.fetch import Page
from executors.web.markup import Markup
from executors.web.urls import fetched_form

META_BYTES = 4096
GUESS_BYTES = 64 * 1024

# UTF-32 first: its mark begins like that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Names that pages use for more than they say, as browsers read them (https://encoding.spec.whatwg.org/#names-and-labels).
CHARSETS = {
    "ascii": "cp1252",
    "big5": "big5hkscs",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "shift_jis": "cp932",
    "tis-620": "cp874",
    "iso8859-11": "cp874",
}
# Labels that Python does not know.
LABELS = {
    "x-gbk": "gb18030",
    "x-sjis": "cp932",
    "x-euc-jp": "euc_jp",
    "ks_c_5601-1987": "cp949",
    "windows-949": "cp949",
    "windows-31j": "cp932",
    "x-cp1251": "cp1251",
    "x-cp1252": "cp1252",
    "x-mac-cyrillic": "mac-cyrillic",
    "unicode": "utf-16-le",
    "utf8mb4": "utf-8",
    "big5-hkscs": "big5hkscs",
    "x-x-big5": "big5hkscs",
}
# What pages without a declaration are written in; of all that Python knows, a guess would often be an EBCDIC.
GUESSED = (
    "utf_8", "gb18030", "big5", "big5hkscs", "cp932", "euc_jp", "cp949", "euc_kr", "cp1250", "cp1251", "cp1252",
    "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "koi8_r", "cp874", "iso2022_jp",
)  # fmt: skip
NO_CHARSETS = ("punycode", "idna", "undefined", "unicode-escape", "raw-unicode-escape", "utf-7")

_META = re.compile(rb"<meta[^>]{0,500}?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_XML_ENCODING = re.compile(rb"\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([\w.:-]+)", re.IGNORECASE)
# Each comment ends at its first "-->": else there would be countless ways to divide what is none of this.
_HTML_BEGINS = re.compile(
    rb"\s*(?:<!--(?:(?!-->).)*-->\s*)*(?:<\?xml[^>]*>\s*)?<(?:!doctype html|html|head|body)\b",
    re.IGNORECASE | re.DOTALL,
)


def is_html(page: Page) -> bool:
    """By Content-Type; without one, by the first bytes."""
    if page.content_type:
        return page.content_type in ("text/html", "application/xhtml+xml")
    return bool(_HTML_BEGINS.match(page.body[:META_BYTES].removeprefix(codecs.BOM_UTF8)))


# ---------------------------------------------------------------------------------------------------------------------
# Characters


def decode(page: Page) -> str:
    """The text of a page; what cannot be read is U+FFFD.

    The charset is that of the byte order mark, else of the header, else of <meta> or <?xml, else UTF-8 where the bytes
    are UTF-8, else what charset_normalizer (it comes with requests) takes them for. Not requests' own guess: that is
    ISO-8859-1 for every page whose header does not say."""
    body = page.body
    for mark, encoding in BYTE_ORDER_MARKS:
        if body.startswith(mark):
            return body[len(mark) :].decode(encoding, "replace")
    header = re.search(r"charset\s*=\s*[\"']?\s*([\w.:-]+)", page.headers.get("Content-Type") or "", re.IGNORECASE)
    name = charset(header.group(1)) if header else None
    name = name or declared_charset(body)
    if name is None:
        try:
            return body.decode("utf-8")
        except UnicodeDecodeError as error:
            if page.is_truncated and error.start >= len(body) - 4:  # a character that was cut through
                return body.decode("utf-8", "replace")
        name = guessed_charset(body) or "utf-8"
    return body.decode(name, "replace")


def declared_charset(body: bytes) -> Optional[str]:
    """What the page itself says at its beginning."""
    meta = _META.search(body[:META_BYTES]) or _XML_ENCODING.match(body[:META_BYTES])
    name = charset(meta.group(1).decode("ascii", "replace")) if meta else None
    # Whoever can read this in single bytes knows that it is no UTF-16; browsers take it for UTF-8.
    return "utf-8" if name is not None and name.startswith(("utf-16", "utf-32")) else name


def charset(name: str) -> Optional[str]:
    """Python's name of a page's charset; None for what is none."""
    try:
        codec = codecs.lookup(LABELS.get(name.lower(), name))
        b"x".decode(codec.name, "replace")  # refuses codecs that are no charset, such as zip
    except (LookupError, ValueError):
        return None
    return None if codec.name in NO_CHARSETS else CHARSETS.get(codec.name, codec.name)


def guessed_charset(body: bytes) -> Optional[str]:
    """For bytes without a declaration that are no UTF-8; from the text around the first of them."""
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return None
    first = next((match.start() for match in re.finditer(rb"[\x80-\xff]", body)), 0)
    # Tags are ASCII in every charset and drown the letters that tell them apart.
    sample = re.sub(rb"<[^>]{0,1000}>", b" ", body[max(0, first - 1024) :][:GUESS_BYTES])
    best = from_bytes(sample, cp_isolation=list(GUESSED)).best()
    return charset(best.encoding) if best is not None else None


# ---------------------------------------------------------------------------------------------------------------------
# Links and text


def links_of(markup: Markup, page_url: str) -> list[str]:
    """The page's distinct http(s) links as they are fetched, in order, itself included where it links itself."""
    base = fetched_form(markup.base, base=page_url) or page_url
    links = (fetched_form(href, base=base) for href in markup.hrefs)
    return list(dict.fromkeys(link for link in links if link is not None))


def text_length(page: Page) -> int:
    """Characters of a plain text that are no white space; 0 for what is no text."""
    if not page.content_type.startswith("text/"):
        return 0
    return len("".join(decode(page).split()))
