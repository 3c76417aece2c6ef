"""What would AppsFlyer answer? A stand-in for tests and the demo, on two loopback ports, without any real data.

`python tests/fake_appsflyer.py --port 0` runs it by itself and prints `ready URL`. The first port is the API, the second
one ("rawdata") holds the reports behind one-time signed URLs, as AppsFlyer's redirects do.

Its rows are made from a seed of (app, report, day): the same call gives the same bytes. It checks what AppsFlyer checks
(token, app, dates, lookback, maximum_rows, additional_fields, quotas), truncates silently at the cap, and does what a
fault says for one request. Only what the real service would not tell is under /fake: the rows of a day, and counts.
"""

from __future__ import annotations

import argparse
import csv
import email.utils
import gzip
import io
import json
import random
import re
import secrets
import socketserver
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import bottle

TOKEN = "fake.t0ken-of-nobody.V2"
COLUMNS = (
    "Attributed Touch Type,Attributed Touch Time,Install Time,Event Time,Event Name,Event Value,Event Revenue,"
    "Event Revenue Currency,Event Revenue USD,Event Source,Is Receipt Validated,Partner,Media Source,Channel,Keywords,"
    "Campaign,Campaign ID,Adset,Adset ID,Ad,Ad ID,Ad Type,Site ID,Sub Site ID,Sub Param 1,Sub Param 2,Sub Param 3,"
    "Sub Param 4,Sub Param 5,Cost Model,Cost Value,Cost Currency,"
    + "".join(
        f"Contributor {n} Partner,Contributor {n} Media Source,Contributor {n} Campaign,Contributor {n} Touch Type,"
        f"Contributor {n} Touch Time,"
        for n in (1, 2, 3)
    )
    + "Region,Country Code,State,City,Postal Code,DMA,IP,WIFI,Operator,Carrier,Language,AppsFlyer ID,Advertising ID,IDFA,"
    "Android ID,Customer User ID,IMEI,IDFV,Platform,Device Type,OS Version,App Version,SDK Version,App ID,App Name,"
    "Bundle ID,Is Retargeting,Retargeting Conversion Type,Attribution Lookback,Reengagement Window,Is Primary Attribution,"
    "User Agent,HTTP Referrer,Original URL"
).split(",")
EVENT_TIME = COLUMNS.index("Event Time")
BY_DATE_HEADER = (
    "Date,Agency/PMD (af_prt),Media Source (pid),Campaign (c),Impressions,Clicks,CTR,Installs,Conversion Rate,Sessions,"
    "Loyal Users,Loyal Users/Installs,Total Revenue,Total Cost,ROI,ARPU,Average eCPI,af_purchase (Unique users),"
    "af_purchase (Event counter),af_purchase (Sales in USD)"
)
BY_DATE_COLUMNS = BY_DATE_HEADER.split(",")
AGGREGATES = ("partners_by_date_report", "daily_report", "geo_by_date_report", "partners_report", "geo_report")
ADDITIONAL_FIELDS = ("device_model", "oaid", "match_type", "campaign_type", "keyword_id")
MEDIA_SOURCES = ("Facebook Ads", "googleadwords_int", "tiktokglobal_int")
NOT_FOUND = "<html><head><title>404</title></head><body><h1>AppsFlyer 404 error message page</h1></body></html>"
DAILY_LIMIT = (
    "You've reached your maximum number of {} that can be downloaded today for this {}. "
    '<a href="https://support.example/quota">Learn more</a>. For details about increasing your limit, contact your CSM'
)
MAIN_FAULTS = ("500", "403 limit", "403", "404", "416", "408", "429", "429 soon", "blank", "html", "slow", "no raw",
               "bad limit", "old quota", "account quota", "revoked", "evil redirect", "echo", "json error")  # fmt: skip
RAW_FAULTS = ("cut", "half row", "gone", "stored blank", "stored html", "drip")


@dataclass
class App:
    app_id: str
    name: str
    platform: str = "android"
    time_zone: str = "UTC"
    rows_per_day: int = 12


def twelve_apps() -> list[App]:
    names = (
        "Lantern",
        "Ferry",
        "Orchard",
        "Quarry",
        "Harbour",
        "Meadow",
        "Cinder",
        "Marble",
        "Thistle",
        "Gable",
        "灯笼",
        "Moor",
    )
    return [
        App(f"id10000000{n:02d}", name, "ios")
        if n % 3 == 0
        else App(f"com.example.{'lamp' if n == 10 else name.lower()}", name)
        for n, name in enumerate(names)
    ]


@dataclass
class Call:
    """One request, as a test may look at it."""

    path: str
    query: dict[str, str]
    authorization: str
    host: str
    status: int = 200


@dataclass
class FakeAppsFlyer:
    """The settings are attributes; a test may change them while it runs."""

    apps: list[App] = field(default_factory=twelve_apps)
    tokens: tuple[str, ...] = (TOKEN,)
    clock: Callable[[], float] = time.time
    day_seconds: float = 86400.0  # how long a quota's day is
    hints: bool = False  # whether refusals carry Retry-After, which the real service does not promise
    row_caps: tuple[int, ...] = (200_000, 1_000_000)
    installs_limit: int = 24
    events_limit: int = 12
    aggregate_limit: int = 24
    aggregate_account_limit: int = 120
    short_aggregate_seconds: float = 60.0
    lists_a_minute: int = 20
    lists_a_day: int = 100
    line_end: str = "\r\n"
    has_bom: bool = True
    absolute_next: bool = True
    is_packed: bool = False  # Content-Encoding: gzip, which the real service may use or not
    is_end_included: bool = False  # whether `to` with a time belongs to the window
    port: int = 0

    def __post_init__(self) -> None:
        self.calls: list[Call] = []
        self.told: Counter[str] = Counter()  # how often each kind of answer was given
        self.faults: dict[str, deque[str]] = defaultdict(deque)  # by app id, "*" for any, or "list"
        self._used: Counter[tuple[Any, ...]] = Counter()
        self._last_short: dict[tuple[str, str], float] = {}
        self._list_calls: deque[float] = deque()
        self._stored: dict[str, tuple[bytes, str]] = {}
        self._lock = threading.Lock()

    # ---- life ----

    def start(self) -> FakeAppsFlyer:
        self._servers = [serve(self._api(), self.port), serve(self._rawdata(), 0)]
        self.url, self.rawdata_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        return self

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fault(self, app_id: str, *names: str) -> None:
        """The next requests for this app ("list": of the app list) go wrong so, one after the other."""
        assert set(names) <= {*MAIN_FAULTS, *RAW_FAULTS}, names
        self.faults[app_id].extend(names)

    # ---- rows ----

    def rows(self, app_id: str, report: str, day: str) -> list[list[str]]:
        """All rows of one day, oldest first."""
        return aggregate_rows(app_id, report, day) if report in AGGREGATES else raw_rows(self._app(app_id), report, day)

    def columns(self, report: str) -> list[str]:
        columns = BY_DATE_COLUMNS if report in AGGREGATES else COLUMNS
        return columns if report not in ("partners_report", "geo_report") else columns[1:]

    def _app(self, app_id: str) -> App:
        return next(app for app in self.apps if app.app_id == app_id)

    # ---- the API's port ----

    def _api(self) -> bottle.Bottle:
        app = bottle.Bottle(catchall=True)
        app.route("/api/mng/apps", "GET", self._list)
        app.route("/api/raw-data/export/app/<app_id>/<report>/v5", "GET", self._raw)
        app.route("/api/agg-data/export/app/<app_id>/<report>/v5", "GET", self._aggregate)
        app.route("/fake/rows", "GET", self._tell_rows)
        app.route("/fake/told", "GET", lambda: json_answer(dict(self.told)))
        app.error(404)(lambda error: NOT_FOUND)
        return app

    def _note(self) -> Call:
        request = bottle.request
        query = {name: request.query.getunicode(name) for name in request.query}
        call = Call(request.path, query, request.get_header("Authorization", ""), request.get_header("Host", ""))
        self.calls.append(call)
        return call

    def _list(self) -> Any:
        call = self._note()
        with self._lock:
            now = self.clock()
            day = ("list", int(now // self.day_seconds))
            while self._list_calls and self._list_calls[0] <= now - 60:
                self._list_calls.popleft()
            if len(self._list_calls) >= self.lists_a_minute or self._used[day] >= self.lists_a_day:
                return self._say(call, 429, json.dumps("Too many requests"), "application/json")
            self._list_calls.append(now)
            self._used[day] += 1
        trouble = self._fault("list", MAIN_FAULTS)
        if trouble:
            return self._go_wrong(call, trouble)
        if not self._knows_token(call):
            return self._say(call, 401, json.dumps("Unauthorized"), "application/json")
        limit, offset = int(call.query.get("limit", 1000)), int(call.query.get("offset", 0))
        page = self.apps[offset : offset + limit]
        links = {"self": bottle.request.url}
        if offset + limit < len(self.apps):
            base = self.url if self.absolute_next else ""
            links["next"] = f"{base}/api/mng/apps?limit={limit}&offset={offset + limit}"
        return self._say(
            call,
            200,
            json.dumps({
                "data": [
                    {"id": app.app_id, "type": "app", "attributes": {
                        "name": app.name, "platform": app.platform, "currency": "USD", "time_zone": app.time_zone}}
                    for app in page
                ],
                "meta": {"total_items": len(self.apps)},
                "links": links,
            }),
            "application/json",
        )  # fmt: skip

    def _raw(self, app_id: str, report: str) -> Any:
        call = self._note()
        refusal = self._refusal(call, app_id, report)
        if refusal is not None:
            return refusal
        query = call.query
        start, end = read_bounds(query["from"], query["to"])
        if start.date() < self.today - timedelta(days=90):
            return self._say(call, 400, "Raw reports historical lookback is limited to 90 days")
        cap = query.get("maximum_rows", str(self.row_caps[0]))
        if cap not in map(str, self.row_caps):
            return self._say(call, 400, "Invalid limit type")
        additional = [name for name in query.get("additional_fields", "").split(",") if name]
        unknown = [name for name in additional if name not in ADDITIONAL_FIELDS]
        if unknown:
            return self._say(call, 400, f"Unknown additional field: {unknown[0]}")
        kind, limit = (
            ("in-app event reports", self.events_limit)
            if "event" in report
            else ("install reports", self.installs_limit)
        )
        if self._use(("raw", app_id, report), limit) > limit:
            return self._say(call, 400, DAILY_LIMIT.format(kind, "app"), hint=self._to_midnight)
        rows = [
            row for row in self._between(app_id, report, start, end) if query.get("media_source") in (None, row[12])
        ]
        rows = sorted(rows, key=lambda row: row[EVENT_TIME], reverse=True)[
            : int(cap)
        ]  # the latest, and not a word of it
        columns = [*COLUMNS, *(name.replace("_", " ").title() for name in additional)]
        body = self._csv(columns, [[*row, *([""] * len(additional))] for row in rows])
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._stored[name] = (body, self._fault(app_id, RAW_FAULTS) or "")
        call.status = 302
        self.told["report"] += 1
        return bottle.HTTPResponse("", 302, {"Location": f"{self.rawdata_url}/export/{name}?signature={name[::-1]}"})

    def _aggregate(self, app_id: str, report: str) -> Any:
        call = self._note()
        refusal = self._refusal(call, app_id, report)
        if refusal is not None:
            return refusal
        start, end = read_bounds(call.query["from"], call.query["to"])
        if (end - start).days <= 2:
            with self._lock:
                now, last = self.clock(), self._last_short.get((app_id, report), float("-inf"))
                if now - last < self.short_aggregate_seconds:
                    said = f"Limit reached for {report.replace('_report', '').replace('_', '-')}-report"
                    return self._say(call, 403, said, hint=self.short_aggregate_seconds)
                self._last_short[app_id, report] = now
        elif self._use(("agg", app_id), self.aggregate_limit) > self.aggregate_limit:
            said = "Your API calls limit has been reached for report type " + report
            return self._say(call, 400, said, hint=self._to_midnight)
        elif self._use(("agg",), self.aggregate_account_limit) > self.aggregate_account_limit:
            return self._say(call, 400, DAILY_LIMIT.format("reports", "account"), hint=self._to_midnight)
        self.told["report"] += 1
        rows = self._between(app_id, report, start, end)
        return bottle.HTTPResponse(self._csv(self.columns(report), rows), 200, {"Content-Type": "text/csv"})

    def _between(self, app_id: str, report: str, start: datetime, end: datetime) -> Iterator[list[str]]:
        day = start.date()
        while datetime.combine(day, datetime.min.time()) < end + timedelta(seconds=self.is_end_included):
            for row in self.rows(app_id, report, day.isoformat()):
                moment = datetime.fromisoformat(row[EVENT_TIME]) if report not in AGGREGATES else start
                if start <= moment < end or (self.is_end_included and moment == end):
                    yield row if report not in ("partners_report", "geo_report") else row[1:]
            day += timedelta(days=1)

    def _refusal(self, call: Call, app_id: str, report: str) -> Any:
        """What is wrong with a report's request before its quota is looked at, or a fault that is due; None: nothing."""
        trouble = self._fault(app_id, MAIN_FAULTS)
        if trouble:
            return self._go_wrong(call, trouble)
        if not self._knows_token(call):
            return self._say(call, 401, "Supplied API token is invalid")
        if app_id not in [app.app_id for app in self.apps]:
            return self._say(call, 404, NOT_FOUND, "text/html")
        try:
            start, end = read_bounds(call.query.get("from", ""), call.query.get("to", ""))
        except ValueError:
            return self._say(call, 400, "Unrecognized date format.")
        return self._say(call, 400, "From date can't be after To date.") if start >= end else None

    def _go_wrong(self, call: Call, trouble: str) -> Any:
        if trouble == "slow":
            time.sleep(60)
            trouble = "500"
        if trouble == "evil redirect":
            call.status = 302
            return bottle.HTTPResponse("", 302, {"Location": "file:///etc/passwd"})
        status, text = {
            "500": (500, "<html><body>Internal <b>error</b></body></html>"),
            "403 limit": (403, "Limit reached for daily-report"),
            "403": (403, "Forbidden"),
            "404": (404, NOT_FOUND),
            "416": (416, "Requested range"),
            "408": (408, ""),
            "429": (429, json.dumps("Too many requests")),
            "429 soon": (429, json.dumps("Too many requests")),
            "blank": (200, ""),
            "html": (200, "<html><body>We are down for maintenance, sorry</body></html>"),
            "no raw": (400, "Your current subscription package doesn't include raw data reports"),
            "bad limit": (400, "Invalid limit type"),
            "old quota": (400, "Your API calls limit has been reached for report type installs"),
            "account quota": (400, DAILY_LIMIT.format("install reports", "account")),
            "revoked": (401, json.dumps({"error": "Authentication error"})),
            "echo": (400, f"Bad request with {call.authorization}"),
            "json error": (400, json.dumps({"message": "Something <i>else</i>"})),
        }[trouble]
        return self._say(call, status, text, hint={"429 soon": 7, "403 limit": 3}.get(trouble))

    def _fault(self, scope: str, names: tuple[str, ...]) -> str | None:
        for faults in (self.faults[scope], self.faults["*"] if scope != "list" else None):
            if faults and faults[0] in names:
                return faults.popleft()
        return None

    def _say(self, call: Call, status: int, text: str, kind: str = "text/plain", hint: float | None = None) -> Any:
        call.status = status
        if status != 200:
            self.told[f"{status} {text[:40]}"] += 1
        headers = {"Content-Type": kind, "Date": email.utils.formatdate(self.clock(), usegmt=True)}
        if hint is not None and (self.hints or status == 429):
            headers["Retry-After"] = str(max(1, int(hint + 0.999)))
        return bottle.HTTPResponse(text.encode(), status, headers)

    def _knows_token(self, call: Call) -> bool:
        return call.authorization in [f"Bearer {token}" for token in self.tokens]

    def _use(self, what: tuple[str, ...], limit: int) -> int:
        """The quota's counter with this download; what is refused uses up nothing."""
        with self._lock:
            key = (*what, int(self.clock() // self.day_seconds))
            used = self._used[key] + 1
            self._used[key] = min(used, limit)
            return used

    @property
    def today(self) -> date:
        return datetime.fromtimestamp(self.clock(), timezone.utc).date()

    @property
    def _to_midnight(self) -> float:
        return self.day_seconds - self.clock() % self.day_seconds

    def _csv(self, columns: list[str], rows: Any) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator=self.line_end)
        writer.writerow(columns)
        writer.writerows(rows)
        return text.getvalue().encode("utf-8-sig" if self.has_bom else "utf-8")

    def _tell_rows(self) -> Any:
        query = bottle.request.query
        return json_answer({day: self.rows(query.app_id, query.report, day) for day in query.days.split(",")})

    # ---- the port of the stored reports ----

    def _rawdata(self) -> bottle.Bottle:
        app = bottle.Bottle()
        app.route("/export/<name>", "GET", self._export)
        return app

    def _export(self, name: str) -> Any:
        self._note()
        with self._lock:
            body, trouble = self._stored.pop(name, (b"", "gone"))
        if trouble == "gone":
            return bottle.HTTPResponse(
                "<Error><Code>AccessDenied</Code></Error>", 403, {"Content-Type": "application/xml"}
            )
        if trouble == "stored blank":
            body = b""
        if trouble == "stored html":
            body = b"<html><body>oh, no</body></html>"
        headers = {"Content-Type": "text/csv"}
        if self.is_packed:
            body = gzip.compress(body)
            headers["Content-Encoding"] = "gzip"
        headers["Content-Length"] = str(len(body))
        if trouble == "half row":
            body = body[: int(len(body) * 0.6)].rstrip(b"\r\n")
            headers["Content-Length"] = str(len(body))
        if trouble == "cut":
            return bottle.HTTPResponse(iter([body[: len(body) // 2]]), 200, headers)
        if trouble == "drip":
            return bottle.HTTPResponse(drip(body), 200, headers)
        return bottle.HTTPResponse(body, 200, headers)


def drip(body: bytes) -> Iterator[bytes]:
    for at in range(len(body)):
        yield body[at : at + 1]
        time.sleep(0.1)


def raw_rows(app: App, report: str, day: str) -> list[list[str]]:
    """Rows of one day, oldest first, with what hurts a careless reader: commas, quotes, line breaks, other scripts."""
    rng = random.Random(f"{app.app_id}|{report}|{day}")
    count = rng.randint(max(1, app.rows_per_day // 2), app.rows_per_day) if app.rows_per_day else 0
    is_event = "event" in report
    rows = []
    for second in sorted(rng.randrange(86400) // 60 * 60 for _ in range(count)):
        moment = f"{day} {second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
        cells = dict.fromkeys(COLUMNS, "")
        cells.update({
            "Attributed Touch Type": rng.choice(("click", "impression")), "Event Time": moment, "Install Time": moment,
            "Event Name": "af_purchase" if is_event else "install", "Event Source": "SDK",
            "Event Value": json.dumps({"af_price": rng.randint(1, 99), "note": 'a "quoted", word'}) if is_event else "",
            "Media Source": rng.choice(MEDIA_SOURCES), "Campaign": rng.choice(("夏季, 促销", "Été\nen deux lignes", "two\r\nlines", "plain")),
            "Region": "EU", "Country Code": "DE", "IP": f"192.0.2.{rng.randint(1, 254)}", "WIFI": "true",
            "AppsFlyer ID": f"{rng.randrange(10**12, 10**13)}-{rng.randrange(10**18, 10**19)}",
            "Platform": app.platform, "App ID": app.app_id, "App Name": app.name, "Attribution Lookback": "7d",
            "User Agent": "Mozilla/5.0 (Linux; Android 14, like this)",
        })  # fmt: skip
        rows.append([cells[name] for name in COLUMNS])
    return rows


def aggregate_rows(app_id: str, report: str, day: str) -> list[list[str]]:
    rng = random.Random(f"{app_id}|{report}|{day}")
    rows = []
    for source in (*MEDIA_SOURCES, "Organic"):
        numbers = [str(rng.randint(0, 5000)) for _ in range(len(BY_DATE_COLUMNS) - 6)]
        rows.append([day, "None" if source == "Organic" else "", source, "None", "N/A", "0.0000", *numbers])
    return rows


def read_bounds(first: str, last: str) -> tuple[datetime, datetime]:
    """`from` and `to` as a window without its end; ValueError for what is no date."""
    if not all(re.fullmatch(r"\d{4}-\d\d-\d\d( \d\d:\d\d(:\d\d)?)?", text) for text in (first, last)):
        raise ValueError(first)
    end = datetime.fromisoformat(last)
    return datetime.fromisoformat(first), end + timedelta(days=1) if len(last) == 10 else end


def json_answer(value: Any) -> Any:
    return bottle.HTTPResponse(json.dumps(value), 200, {"Content-Type": "application/json"})


class ThreadingServer(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A test looks at `calls` instead."""

    def address_string(self) -> str:
        return str(self.client_address[0])


def serve(app: bottle.Bottle, port: int) -> WSGIServer:
    server = make_server("127.0.0.1", port, app, ThreadingServer, QuietHandler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for AppsFlyer on this machine, without real data.")
    parser.add_argument("--port", type=int, default=0, help="the API's port; 0 takes a free one")
    parser.add_argument("--day-seconds", type=float, default=86400.0, help="how long a quota's day is")
    parser.add_argument("--hints", action="store_true", help="refusals say in Retry-After how long to wait")
    parser.add_argument("--installs-limit", type=int, default=24, help="downloads a day, app and report")
    parser.add_argument("--events-limit", type=int, default=12, help="downloads of events a day, app and report")
    parser.add_argument("--account-limit", type=int, default=120, help="long aggregate pulls a day")
    parser.add_argument("--row-caps", default="200000,1000000", help="what maximum_rows may be")
    parser.add_argument("--faults", default="", help="comma list; the next requests for reports go wrong so")
    parser.add_argument("--stop-with-stdin", action="store_true", help="end when standard input does")
    options = parser.parse_args()
    fake = FakeAppsFlyer(
        port=options.port, day_seconds=options.day_seconds, hints=options.hints, installs_limit=options.installs_limit,
        events_limit=options.events_limit, aggregate_account_limit=options.account_limit,
        row_caps=tuple(int(cap) for cap in options.row_caps.split(",")),
    )  # fmt: skip
    fake.apps[3].rows_per_day = fake.apps[8].rows_per_day = 60
    if options.faults:
        fake.fault("*", *options.faults.split(","))
    fake.start()
    print(f"ready {fake.url}\n", end="", flush=True)
    if options.stop_with_stdin:
        sys.stdin.read()
    else:
        threading.Event().wait()


if __name__ == "__main__":
    main()
