"""Which tasks come of a page, or of a sitemap?

A child carries on what its parent was told, and is known by its canonical URL: the batch sees to it that a page is
fetched once, whichever of its spellings a page links.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Optional

from executors.web.fetch import Page
from executors.web.order import Follow, Order
from executors.web.sitemap import Sitemap
from executors.web.urls import canonical, host_of, scrub_headers

MAX_CHILDREN = 5000
MAX_CHILDREN_BYTES = 4 * 1024 * 1024
MAX_KEY_CHARACTERS = 1024

Allows = Callable[[str], bool]


def children(
    order: Order, page: Page, links: list[str], task: Mapping[str, Any], allows: Allows, look: Callable[[], None]
) -> list[dict[str, Any]]:
    """One new task for each link that may be followed; `allows` is what robots.txt says of the page's own host. `look`
    is called at each link, and ends it by what it raises."""
    follow = order.follow
    if follow is None or (follow.max_depth is not None and order.depth >= follow.max_depth):
        return []
    # Only the start page may move the crawl to another host (example.com -> www.example.com).
    host = host_of(page.url) if order.depth == 0 else host_of(order.url)
    if follow.same_host and host_of(page.url) != host:
        return []
    # The start page has no key of its own in the batch, wherever its task came from.
    start = order.start or (page.url if order.depth == 0 else None)
    known = {canonical(url) for url in (order.url, page.url, start) if url}
    new_tasks = Tasks()
    for link in links:
        look()
        key = canonical(link)
        if key not in known and may_follow(link, follow, host, allows):
            known.add(key)
            if not new_tasks.take(page_task(order, link, key, task, start)):
                break
    return new_tasks.taken


def from_sitemap(
    order: Order, source: str, sitemap: Sitemap, task: Mapping[str, Any], allows: Allows, look: Callable[[], None]
) -> list[dict[str, Any]]:
    """The tasks of the sitemap at `source`: its pages, its sitemaps and, where that is too much for one report, a task
    that goes on where this one stops."""
    follow = order.follow or Follow()
    entries = [*((url, False) for url in sitemap.pages), *((url, True) for url in sitemap.sitemaps)]
    new_tasks = Tasks()
    for i, (url, is_sitemap) in enumerate(entries):
        look()
        if i < order.sitemap_offset:
            continue
        if is_sitemap:
            # An index may name its parts on another host; with same_host it is not followed there.
            is_wanted = not follow.same_host or host_of(url) == host_of(source)
            new_task = sitemap_task(order, url, 0, task) if is_wanted else None
        else:
            is_wanted = may_follow(url, follow, host_of(order.url), allows)
            new_task = page_task(order, url, canonical(url), task) if is_wanted else None
        if new_task is not None and not new_tasks.take(new_task):
            rest = sitemap_task(order, source, i, task)
            return [*new_tasks.taken, rest] if rest is not None else new_tasks.taken
    return new_tasks.taken


class Tasks:
    """New tasks, as many as one report may carry."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self._bytes_left = MAX_CHILDREN_BYTES

    def take(self, new_task: dict[str, Any]) -> bool:
        """Whether there was room for it."""
        self._bytes_left -= len(json.dumps(new_task))
        if self._bytes_left < 0 or len(self.taken) >= MAX_CHILDREN:
            return False
        self.taken.append(new_task)
        return True


def may_follow(link: str, follow: Follow, host: str, allows: Allows) -> bool:
    is_same = host_of(link) == host
    if follow.same_host and not is_same:
        return False
    if any(finds(link) for finds in follow.deny):
        return False
    if follow.allow and not any(finds(link) for finds in follow.allow):
        return False
    return not is_same or allows(link)


def page_task(
    order: Order, link: str, key: str, task: Mapping[str, Any], start: Optional[str] = None
) -> dict[str, Any]:
    task_data = {"url": link, "depth": order.depth + 1}
    if start and order.follow is not None:
        task_data["start"] = start
    new_task = child(order, link, task, task_data)
    new_task["unique_key"] = key if len(key) <= MAX_KEY_CHARACTERS else link
    if order.fields or order.items is not None:
        new_task["required_tags"] = ["selectors"]
    return new_task


def sitemap_task(order: Order, url: str, offset: int, task: Mapping[str, Any]) -> Optional[dict[str, Any]]:
    """The task that reads a further sitemap; its key keeps it apart from the same URL as a page."""
    key = f"sitemap:{canonical(url)}" + (f"#{offset}" if offset else "")
    if len(key) > MAX_KEY_CHARACTERS:
        return None
    data: dict[str, Any] = {"url": order.url, "depth": order.depth, "sitemap": url}
    if offset:
        data["sitemap_offset"] = offset
    return {**child(order, url, task, data), "unique_key": key}


def child(order: Order, to_url: str, task: Mapping[str, Any], task_data: dict[str, Any]) -> dict[str, Any]:
    task_data = {**task_data, **order.passed_on}
    headers = scrub_headers(order.headers, order.url, to_url)
    headers = {name: value for name, value in headers.items() if name.lower() != "content-type"}
    if headers:
        task_data["headers"] = headers
    new_task: dict[str, Any] = {"task_type": "crawl", "task_data": task_data}
    # Without a batch of its own a second crawl of the same site would find all its pages known.
    new_task["batch"] = task.get("batch") or f"crawl-{task.get('id')}"
    new_task["parent_id"] = task.get("id")
    for name in ("priority", "username", "app_id"):
        if task.get(name) is not None:
            new_task[name] = task[name]
    if task.get("execution_timeout_seconds"):
        new_task["execution_timeout_seconds"] = max(1, int(task["execution_timeout_seconds"]))
    if order.follow is not None and order.follow.max_pages is not None:
        new_task["max_batch_tasks"] = order.follow.max_pages
    return new_task
