"""Which values are taken out of a page?

    fields     {name: selector}: the text of the first match, or null; a selector in a list gives all matches
    items      {"selector": …, "fields": {…}}: one record for each match, its fields looked for inside it
    jmespath   an expression over a JSON page, https://jmespath.org

A selector is CSS, or XPath where it begins with "/", "./", "(" or "xpath:". parsel reads both (tag "selectors" of the
device), jmespath the third (tag "jmespath"); each is imported when it is needed. Every mistake in them is found before
anything is fetched, and named with its place in task_data.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Union

from executors.task_executor import DoNotRetry, Retry
from executors.web.fetch import Page
from executors.web.page import decode

MAX_ITEMS = 10_000
MAX_EXTRACTED_BYTES = 4 * 1024 * 1024
MAX_VALUE_CHARACTERS = 100_000

Fields = Mapping[str, Union[str, list[str]]]


@dataclass(frozen=True)
class Items:
    selector: str
    fields: Fields


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


def read_fields(fields: Any, where: str = "task_data.fields") -> Fields:
    """Checked fields; DoNotRetry names the field and what to write."""
    if fields is None or fields == {}:
        return {}
    if not isinstance(fields, dict):
        raise DoNotRetry(f'{where} must be an object of name and selector, such as {{"price": ".price"}}')
    need_parsel(where)
    for name, selector in fields.items():
        check_selector(
            selector[0] if isinstance(selector, list) and len(selector) == 1 else selector, f"{where}.{name}"
        )
    return fields


def read_items(items: Any) -> Union[Items, None]:
    """Checked items; DoNotRetry names the field and what to write."""
    if items is None:
        return None
    if not isinstance(items, dict) or set(items) != {"selector", "fields"} or not items["fields"]:
        example = '{"selector": ".product", "fields": {"name": "h2", "price": ".price"}}'
        raise DoNotRetry(f"task_data.items must have a selector and fields, such as {example}")
    need_parsel("task_data.items")
    check_selector(items["selector"], "task_data.items.selector")
    return Items(items["selector"], read_fields(items["fields"], "task_data.items.fields"))


def need_parsel(where: str) -> None:
    if not is_installed("parsel"):
        raise DoNotRetry(f'{where} needs parsel on the device: submit it with required_tags ["selectors"]')


def check_selector(selector: Any, where: str) -> None:
    if not isinstance(selector, str) or not selector.strip():
        raise DoNotRetry(f"{where} must be a CSS selector or an XPath, or a list with one of them for all matches")
    from cssselect import SelectorError
    from lxml import etree
    from parsel.csstranslator import HTMLTranslator

    xpath = xpath_of(selector)
    try:
        if xpath is None:
            HTMLTranslator().css_to_xpath(selector)
        else:
            etree.XPath(xpath, namespaces={"re": "http://exslt.org/regular-expressions"})
    except (SelectorError, etree.XPathError, ValueError, RecursionError) as error:
        kind = "CSS selector" if xpath is None else "XPath"
        raise DoNotRetry(f"{where} is {selector!r:.100}, no {kind}: {error}") from None


def xpath_of(selector: str) -> Union[str, None]:
    """The XPath that a selector is; None for a CSS selector, which cannot begin like one."""
    text = selector.strip()
    if text.startswith("xpath:"):
        return text[len("xpath:") :]
    return text if text.startswith(("/", "./", "(")) else None


def read_jmespath(expression: Any) -> str:
    """A checked expression, "" for none; DoNotRetry says what is wrong."""
    if expression is None:
        return ""
    if not isinstance(expression, str) or not expression.strip():
        raise DoNotRetry('task_data.jmespath must be an expression, such as "data.items[*].{id: id, name: name}"')
    if not is_installed("jmespath"):
        raise DoNotRetry('task_data.jmespath needs jmespath on the device: submit it with required_tags ["jmespath"]')
    import jmespath

    try:
        jmespath.compile(expression)
    except (jmespath.exceptions.JMESPathError, RecursionError) as error:
        first_line = str(error).partition("\n")[0]
        raise DoNotRetry(f"task_data.jmespath is {expression!r:.100}, no expression: {first_line:.300}") from None
    return expression


# ---------------------------------------------------------------------------------------------------------------------
# What is found


class Budget:
    """How much may be found, and until when (time.monotonic) it may be looked for."""

    def __init__(self, end_at: float):
        self._end_at = end_at
        self._bytes_left = MAX_EXTRACTED_BYTES

    def take(self, text: str) -> None:
        self._bytes_left -= len(text.encode("utf-8", "replace")) + 8
        if self._bytes_left < 0:
            raise DoNotRetry(
                f"the selectors of task_data find more than {MAX_EXTRACTED_BYTES} bytes: write narrower ones"
            )
        if time.monotonic() > self._end_at:
            raise DoNotRetry("the selectors of task_data take too long on this page: write narrower ones")


def extract(html: str, fields: Fields, items: Union[Items, None], end_at: float) -> dict[str, Any]:
    """{"fields": …, "items": […]} as far as they are asked for. Raises DoNotRetry where it is too much for a result."""
    from parsel import Selector

    root = Selector(text=html or "<html></html>")
    found: dict[str, Any] = {}
    budget = Budget(end_at)
    try:
        if fields:
            found["fields"] = values(root, fields, budget)
        if items is not None:
            records = select(root, items.selector)
            found["items"] = [values(record, items.fields, budget) for record in records[:MAX_ITEMS]]
            if len(records) > MAX_ITEMS:
                found["items_truncated"] = True
    except (ValueError, RecursionError) as error:  # an XPath that fails on this page, such as one of a wrong type
        raise DoNotRetry(f"a selector of task_data fails on this page: {error!s:.300}") from None
    return found


def values(root: Any, fields: Fields, budget: Budget) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for name, selector in fields.items():
        if isinstance(selector, list):
            answers[name] = list(texts(root, selector[0], budget))
        else:
            answers[name] = next(texts(root, selector, budget), None)
    return answers


def texts(root: Any, selector: str, budget: Budget) -> Iterator[str]:
    """The text of each match, white space folded."""
    for match in select(root, selector):
        if isinstance(getattr(match, "root", match), (str, float, bool)):
            value = str(match.get())
        else:
            value = match.xpath("string()").get() or ""
        text = " ".join(value.split())[:MAX_VALUE_CHARACTERS]
        budget.take(text)
        yield text


def select(root: Any, selector: str) -> Any:
    """What a selector finds. An item's own XPath is looked for inside it, also where it begins with "//"."""
    xpath = xpath_of(selector)
    if xpath is None:
        return root.css(selector)
    is_item = getattr(root.root, "getparent", lambda: None)() is not None
    return root.xpath(f".{xpath}" if is_item and xpath.startswith("//") else xpath)


def search_json(page: Page, expression: str) -> Any:
    """What the expression finds in a JSON page. Raises DoNotRetry, and Retry where the page is none."""
    import jmespath

    if page.is_truncated:
        raise DoNotRetry(f"{page.url} is too large for JSON: {len(page.body)} bytes of it were read; ask for less")
    try:
        document = json.loads(decode(page), parse_constant=lambda name: None, parse_int=whole_number)
    except (ValueError, RecursionError) as error:
        raise Retry(f"{page.url} answered {page.status} and no JSON: {error!s:.300}") from None
    try:
        found = jmespath.search(expression, document)
        size = len(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    except (jmespath.exceptions.JMESPathError, ValueError, TypeError, RecursionError) as error:
        raise DoNotRetry(f"task_data.jmespath fails on {page.url}: {error!s:.300}") from None
    if size > MAX_EXTRACTED_BYTES:
        raise DoNotRetry(f"task_data.jmespath finds {size} bytes, over {MAX_EXTRACTED_BYTES}: write a narrower one")
    return found


def whole_number(digits: str) -> Any:
    """A number past 64 bits stays text: JSON readers would make something else of it."""
    number = int(digits) if len(digits) < 20 else 2**63
    return number if -(2**63) <= number < 2**63 else digits
