"""Which title, text and links has an HTML page? Read in one pass, in a time that grows with the page and no faster.

html.parser needs a time that grows with the square of the page for much that is broken (CVE-2025-6069 is one case;
measured with Python 3.9.18, 3.11.7 and 3.13.0): 200 KB of "<a " take it minutes, in which a thread cannot be stopped.
Here the rules of the HTML standard's tokenizer are followed as far as they matter: comments, doctypes and processing
instructions are skipped, scripts and styles are no text, title and textarea hold no tags, and a tag, comment or quoted
value without an end takes the rest of the page. So each character is looked at once or twice, and an ordinary page
takes a third of the time.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from typing import Optional

MAX_LINKS = 50_000
LOOKS_EVERY = 1000

_NAME = r"[a-zA-Z][a-zA-Z0-9-]*"
# Text and the tag after it, as nearly all are written. No value in it holds a quote or a bracket,
# and a tag with more attributes than that is no tag as nearly all are: one search over millions cannot be ended.
_PLAIN = re.compile(rf'([^<]*)<(/?)({_NAME})((?:\s+[a-zA-Z_:][\w:.-]*(?:="[^"<>]*")?){{0,50}})\s*/?>', re.ASCII).match
_TAG_BEGINS = re.compile(r"<(/?)([a-zA-Z][^\s/>]*)").match
_COMMENT_ENDS = re.compile(r"--!?>").search
_HREF = re.compile(r'\shref="([^"]*)"', re.IGNORECASE).search
_ATTRIBUTE = re.compile(r"[\s/]*([^\s/>][^\s/>=]*)?").match
_EQUALS = re.compile(r"\s*=\s*").match
_BARE_VALUE = re.compile(r"[^\s>]*").match
# int() refuses thousands of digits, and html.unescape lets that through.
_LONG_NUMBER = re.compile(r"&#[0-9]{9,};?")

# Their content is no markup, up to their end tag.
_RAW = ("script", "style", "title", "textarea", "iframe", "noembed", "noframes", "xmp")
_ENDS = {name: re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE) for name in _RAW}
# Their content is markup with links in it, and no visible text.
_HIDDEN = ("noscript", "template")
_LINKS = ("a", "area", "base")
_SPECIAL = frozenset((*_RAW, *_HIDDEN, *_LINKS, "plaintext"))


def plain_text(markup: str) -> str:
    """Text without its character references."""
    if "&" not in markup:
        return markup
    return html.unescape(_LONG_NUMBER.sub("\ufffd", markup))


def attribute_at(page: str, at: int) -> tuple[Optional[str], str, int]:
    """(name, value, where it ends); the name is None at the end of the tag, the place -1 at the end of the page."""
    found = _ATTRIBUTE(page, at)
    assert found is not None  # it matches nothing, too
    name, at = found.group(1), found.end()
    if name is None:
        return None, "", at + 1 if at < len(page) else -1
    equals = _EQUALS(page, at)
    if equals is None:
        return name, "", at
    at = equals.end()
    quote = page[at : at + 1]
    if quote and quote in "\"'":
        ends_at = page.find(quote, at + 1)
        return name, page[at + 1 : ends_at], ends_at + 1 if ends_at >= 0 else -1
    bare = _BARE_VALUE(page, at)
    assert bare is not None
    return name, bare.group(), bare.end()


def href_and_end(page: str, at: int, look: Callable[[], None] = lambda: None) -> tuple[Optional[str], int]:
    """The href of the tag whose attributes begin there, of several the first one; -1 where the tag has no end."""
    href: Optional[str] = None
    count = 0
    while True:
        count += 1
        if count % LOOKS_EVERY == 0:
            look()
        name, value, at = attribute_at(page, at)
        if at < 0 or name is None:
            return href, at
        if href is None and name.lower() == "href":
            href = value


class Markup:
    """What one page holds: `title`, `text_length` without white space, `hrefs` (without fragments) and `base`."""

    def __init__(self, page: str, look: Callable[[], None] = lambda: None):
        """`look` is called every 1,000 tokens or attributes, and ends the reading by what it raises."""
        self.title: Optional[str] = None
        self.base = ""
        self.hrefs: dict[str, None] = {}
        self._page = page
        self._look = look
        self._texts: list[str] = []
        self._hidden = dict.fromkeys(_HIDDEN, 0)
        self._is_visible = True
        self._read()
        self.text_length = len("".join(plain_text("\n".join(self._texts)).split()))
        self._texts.clear()

    def _read(self) -> None:
        page, texts, at = self._page, self._texts, 0
        count = 0
        while True:
            count += 1
            if count % LOOKS_EVERY == 0:
                self._look()
            plain = _PLAIN(page, at)
            if plain is None:
                at = self._read_odd(at)
                if at < 0:
                    return
                continue
            text, slash, name, attributes = plain.groups()
            at = plain.end()
            if text and self._is_visible:
                texts.append(text)
            name = name.lower()
            if name in _SPECIAL:
                if slash:
                    self._end(name)
                elif name in _LINKS:
                    self._note_plain_link(name, attributes)
                else:
                    at = self._start(name, at)
                    if at < 0:
                        return

    def _read_odd(self, at: int) -> int:
        """Whatever is not written as nearly all of it is; answers where to go on, -1 at the end of the page."""
        page = self._page
        begins = page.find("<", at)
        if self._is_visible:
            self._texts.append(page[at:] if begins < 0 else page[at:begins])
        if begins < 0:
            return -1
        tag = _TAG_BEGINS(page, begins)
        if tag is not None:
            return self._read_odd_tag(tag)
        if page.startswith("<!--", begins):
            if page.startswith((">", "->"), begins + 4):  # as a whole, <!--> and <!---> are comments
                return page.index(">", begins) + 1
            ends = _COMMENT_ENDS(page, begins + 4)
            return ends.end() if ends is not None else -1
        if page.startswith(("<!", "<?", "</"), begins):
            ends_at = page.find(">", begins + 2)
            return ends_at + 1 if ends_at >= 0 else -1
        if self._is_visible:
            self._texts.append("<")
        return begins + 1

    def _read_odd_tag(self, tag: re.Match[str]) -> int:
        name = tag.group(2).lower()
        href, at = href_and_end(self._page, tag.end(), self._look)
        if at < 0 or name not in _SPECIAL:
            return at
        if tag.group(1):
            self._end(name)
        elif name in _LINKS:
            if href is not None:
                self._note_href(name, href)
        else:
            return self._start(name, at)
        return at

    def _note_plain_link(self, name: str, attributes: str) -> None:
        found = _HREF(attributes)
        if found is None:
            return
        href: Optional[str] = found.group(1)
        if attributes.count('"', 0, found.start()) % 2:  # inside a value: title=" href=" is no link
            href = href_and_end(attributes + ">", 0)[0]
        if href is not None:
            self._note_href(name, href)

    def _note_href(self, name: str, href: str) -> None:
        href = plain_text(href).strip()
        if name != "base":
            # One page has hundreds of links to parts of itself: each target is resolved once.
            if len(self.hrefs) < MAX_LINKS:
                self.hrefs[href.partition("#")[0]] = None
        elif href and not self.base:
            self.base = href

    def _start(self, name: str, at: int) -> int:
        """Goes into a special element; answers where its markup goes on."""
        page = self._page
        if page[at - 2] == "/":  # <script/> has no content in XHTML, where it is written so
            return at
        if name in self._hidden:
            self._hidden[name] += 1
            self._is_visible = False
            return at
        if name == "plaintext":
            if self._is_visible:
                self._texts.append(page[at:].replace("&", "&amp;"))
            return -1
        ends = _ENDS[name].search(page, at)
        content = page[at : ends.start()] if ends is not None else page[at:]
        if name == "title":
            self.title = self.title or " ".join(plain_text(content[:5000]).split())[:500] or None
        elif name in ("textarea", "xmp") and self._is_visible:
            self._texts.append(content)
        return ends.start() if ends is not None else -1

    def _end(self, name: str) -> None:
        if self._hidden.get(name):
            self._hidden[name] -= 1
            self._is_visible = not any(self._hidden.values())
