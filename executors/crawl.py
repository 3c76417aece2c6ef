"""How is one page fetched, read, and its links turned into tasks?

    read_order -> fetch -> refuse what comes again later -> read -> extract -> keep the raw body -> follow

task_data (only url is required; docs/crawl.md has all of it, with examples):
    url               http or https
    method            GET (default), HEAD, or POST; POST where there is a form or json
    form, json        what is posted: an object of texts, or any JSON
    headers           {name: value}; on a redirect or link to another host only User-Agent and Accept* go along
    timeout_seconds   30; for the whole page: name look-up, redirects and slow servers included
    depth, start      0 and none; set from task to task: how far from the start page, and which that was
    follow            nothing is followed without it; {} follows all links of the same host. In it:
        allow, deny       lists of regular expressions, searched for (re.search) in the link's URL as it would be
                          fetched; no allow means every link; deny wins
        same_host         true; host and port of the start URL (after its redirects)
        max_depth         none; links of a page at this depth are not followed
        max_pages         none; the batch gets no more tasks than that
    sitemap           true: the sitemaps that robots.txt names, else /sitemap.xml; or a sitemap's URL. The task then
                      makes a task of each page in it, by the rules of follow, and fetches no page itself
    fields            {name: selector}: text of the first match, or null; a selector in a list gives all matches
    items             {"selector": …, "fields": {…}}: one record for each match
    jmespath          an expression over a JSON answer
    raw               true keeps the body as the artifact body.gz

result: status, final_url, title, links_found (distinct, to http and https), text_length (visible characters, without
white space), bytes, sha256, elapsed_seconds; fields, items, data (of jmespath) and artifact where asked for; and
"truncated": true where the page was larger than 10 MiB (unpacked), of which the first 10 MiB count.

Every status below 500 is a result, 404 too, except 429, which snoozes the task by its Retry-After (1 s to 1 h, else 60
s), as 503 does with a Retry-After; both close task_data.host, so that no other device asks this host meanwhile. Other
5xx, errors of the connection and time-outs are retried. Wrong task_data, more than 5 redirects, what robots.txt
forbids, addresses that are not public, and bombs are not.

Only links of 2xx HTML pages are followed, at most 5,000 or 4 MiB of tasks a page. Children carry the canonical URL as
unique_key and the start page, so that no page is fetched twice. A task without a batch gives its children the batch
"crawl-ID".

It keeps its own time limits, so it runs in a thread. It must not know the master.
"""

from __future__ import annotations

import gzip
import hashlib
import threading
import time
from collections.abc import Mapping
from typing import Any, Optional
from urllib.parse import urlsplit

from executors.task_executor import DoNotRetry, Result, Snooze, TaskExecutor
from executors.web.connection import Cancelled, OutOfTime
from executors.web.extract import extract, is_installed, search_json
from executors.web.fetch import AskedToWait, Fetcher, Manners, Page, Request, refuse_failure
from executors.web.follow import children, from_sitemap, sitemap_task
from executors.web.markup import Markup
from executors.web.order import Order, read_order
from executors.web.page import decode, is_html, links_of, text_length
from executors.web.sitemap import MAX_SITEMAP_BYTES, read_sitemap
from executors.web.urls import fetched_form, origin_of

RAW_NAME = "body.gz"
MAX_SITEMAPS_OF_ROBOTS = 100


class CrawlExecutor(TaskExecutor):
    isolation = "thread"

    def __init__(self) -> None:
        super().__init__("crawl")
        libraries = {"selectors": "parsel", "jmespath": "jmespath"}
        self.tags = tuple(tag for tag, library in libraries.items() if is_installed(library))

    def execute_task(self, task_data: dict[str, Any]) -> Result:
        order = read_order(task_data)
        crawl = Crawl(order, self.context, fetcher_for(self.context.settings))
        return crawl.sitemap() if order.sitemap else crawl.page()


_fetchers: dict[Manners, Fetcher] = {}
_fetchers_lock = threading.Lock()


def fetcher_for(settings: Mapping[str, Any]) -> Fetcher:
    """The device's one way to the web: its manners count for all slots together."""
    manners = Manners.from_settings(settings)
    with _fetchers_lock:
        if manners not in _fetchers:
            _fetchers.clear()  # settings change with a new process only; tests change them often
            _fetchers[manners] = Fetcher(manners)
        return _fetchers[manners]


class Crawl:
    """One task."""

    def __init__(self, order: Order, context: Any, fetcher: Fetcher):
        self.order = order
        self.context = context
        self.fetcher = fetcher
        self.started = time.monotonic()
        left = context.deadline_seconds
        self.seconds = order.timeout_seconds if left is None else max(0.001, min(order.timeout_seconds, left))

    def page(self) -> Result:
        order = self.order
        page = self.fetch(Request(order.url, order.method, order.headers, order.body))
        html = decode(page) if is_html(page) else None
        markup = Markup(html or "", self.look)
        links = links_of(markup, page.url)
        length = markup.text_length if html is not None else text_length(page)
        result = self.described(page, title=markup.title, links_found=len(links), text_length=length)
        if html is not None and (order.fields or order.items is not None):
            result.update(extract(html, order.fields, order.items, self.started + self.seconds))
        if order.jmespath and order.method != "HEAD":
            result["data"] = search_json(page, order.jmespath)
        if order.raw:
            result["artifact"] = self.keep_raw(page)
        follows = 200 <= page.status < 300 and order.follow is not None
        return Result(result, self.children(page, links) if follows else [])

    def sitemap(self) -> Result:
        """Read a sitemap instead of the page; where robots.txt names several, a task for each of them."""
        order = self.order
        sources = [order.sitemap] if isinstance(order.sitemap, str) else self.named_sitemaps()
        if len(sources) > 1:
            tasks = [sitemap_task(order, source, 0, self.context.task) for source in sources]
            return Result({"sitemaps_found": len(sources)}, [task for task in tasks if task is not None])
        page = self.fetch(Request(sources[0], headers=order.headers, max_bytes=MAX_SITEMAP_BYTES))
        if not 200 <= page.status < 300:
            return Result(self.described(page, pages_found=0, sitemaps_found=0))
        sitemap = read_sitemap(page)
        result = self.described(page, pages_found=len(sitemap.pages), sitemaps_found=len(sitemap.sitemaps))
        if sitemap.is_truncated:
            result["truncated"] = True
        new_tasks = from_sitemap(order, sources[0], sitemap, self.context.task, self.allows(page), self.look)
        return Result(result, new_tasks)

    def named_sitemaps(self) -> list[str]:
        """Those of robots.txt, else /sitemap.xml."""
        origin = origin_of(self.order.url)
        rules = self.fetcher.rules(origin, self.seconds)
        named = [fetched_form(text, base=origin) for text in (rules.sitemaps() if rules is not None else [])]
        known = list(dict.fromkeys(url for url in named if url is not None))[:MAX_SITEMAPS_OF_ROBOTS]
        return known or [f"{origin}/sitemap.xml"]

    def fetch(self, request: Request) -> Page:
        context = self.context
        try:
            page = self.fetcher.fetch(request, self.seconds, lambda: bool(context.cancelled))
            refuse_failure(page)
        except AskedToWait as asked:
            # Where a redirect led to another host, no field of this task names the one that was asked for a pause.
            is_own = urlsplit(asked.url).hostname == urlsplit(self.order.url).hostname
            raise Snooze(asked.seconds, str(asked), closes="task_data.host" if is_own else ()) from None
        return page

    def children(self, page: Page, links: list[str]) -> list[dict[str, Any]]:
        return children(self.order, page, links, self.context.task, self.allows(page), self.look)

    def look(self) -> None:
        """Raises Cancelled or OutOfTime: a hostile page takes its time after it was fetched, too."""
        if self.context.cancelled:
            raise Cancelled(f"cancelled while {self.order.url} was read")
        if time.monotonic() > self.started + self.seconds:
            raise OutOfTime(f"{self.order.url} took longer than {round(self.seconds, 2):g} s: it is slow to read")

    def described(self, page: Page, **found: Any) -> dict[str, Any]:
        result = {
            "status": page.status,
            "final_url": page.url,
            **found,
            "bytes": len(page.body),
            "sha256": hashlib.sha256(page.body).hexdigest(),
            "elapsed_seconds": round(time.monotonic() - self.started, 4),
        }
        if page.is_truncated:
            result["truncated"] = True
        return result

    def allows(self, page: Page) -> Any:
        """What robots.txt says of the links to the page's own origin: what it forbids becomes no task."""
        rules = self.fetcher.rules(page.url, self.seconds)
        agent, origin = self.fetcher.user_agent(self.order.headers), origin_of(page.url)
        if rules is None or not rules.has_rules:
            return lambda link: True
        return lambda link: origin_of(link) != origin or rules.allows(link, agent)

    def keep_raw(self, page: Page) -> Optional[str]:
        """The body as the server sent it, unpacked, in a gzip file; the same body gives the same file."""
        path = self.context.artifact(RAW_NAME)
        try:
            with open(path, "wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
                packed.write(page.body)
        except OSError as error:
            raise DoNotRetry(f"the raw body cannot be kept on this device: {error.strerror}") from None
        return RAW_NAME
