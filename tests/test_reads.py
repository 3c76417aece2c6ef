"""What can be asked of the database: pages, counts, export and statistics, over a real file written by the verbs."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peewee
import pytest

import backlog
import db
import judging
import listing
import openapi
import replies
import schema
import store
import wire
from access import ROLES
from attention import Attention
from metrics import Metrics
from reads import DEVICE_STATES, TASK_COLUMNS, Counted, Reads, ReadsBusy, device_status, iso
from transaction import Tx

START = 1_800_000_000.0


class Fleet:
    """A database file with the verbs to fill it, and its Reads."""

    def __init__(self, path: Path) -> None:
        store.create_database(path)
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode = wal")
        self.connection.execute("PRAGMA synchronous = 0")
        self.now = START
        self.reads = Reads(path, connections=2, wait_seconds=0.05)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Tx]:
        self.connection.execute("BEGIN IMMEDIATE")
        tx = Tx(self.connection, self.now, self.now)
        yield tx
        tx.flush()
        self.connection.execute("COMMIT")

    def submit(self, count: int = 1, **fields: Any) -> list[int]:
        with self.transaction() as tx:
            made = db.submit(tx, [db.NewTask(**{"task_type": "crawl", **fields}) for _ in range(count)])
        return [submitted.id for submitted in made if submitted.id is not None]

    def add_device(self, device_id: str, **columns: Any) -> None:
        row = {"device_id": device_id, "device_name": device_id, "boot_id": "boot-1", "registered_at": self.now, "max_concurrent_tasks": 1,
               "last_heartbeat_at": self.now, "task_types": '["crawl"]', **columns}  # fmt: skip
        names = ", ".join(row)
        marks = ", ".join("?" * len(row))
        self.connection.execute(f"INSERT INTO af_device ({names}) VALUES ({marks})", tuple(row.values()))

    def assign(self, task_id: int, device_id: str) -> tuple[int, str]:
        with self.transaction() as tx:
            task = db.get_task(tx, task_id)
            assert task is not None
            assert db.assign(tx, [task], db.Gift(device_id, None, True))
        return self.connection.execute(
            "SELECT id, lease_id FROM af_task_assignment WHERE task_id = ? ORDER BY id DESC", (task_id,)
        ).fetchone()

    def report(self, device_id: str, lease: tuple[int, str], outcome: str, **fields: Any) -> None:
        with self.transaction() as tx:
            assert judging.apply_report(tx, device_id, db.Report(*lease, outcome, **fields)).outcome == "accepted"

    def finish(self, task_id: int, outcome: str = "completed", device_id: str = "d1", **fields: Any) -> None:
        self.report(device_id, self.assign(task_id, device_id), outcome, **fields)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path / "with % and ?.db")
    yield made
    made.reads.close()
    made.connection.close()


def all_pages(reads: Reads, filters: dict[str, Any], limit: int, seconds: float = 5.0) -> list[int]:
    ids, cursor, pages = [], None, 0
    while True:
        page = reads.task_page(filters, limit=limit, cursor=cursor, seconds=seconds)
        ids += [task["id"] for task in page["tasks"]]
        pages += 1
        assert pages < 500
        if page["next_cursor"] is None:
            return ids
        assert cursor is None or int(page["next_cursor"]) < cursor
        cursor = int(page["next_cursor"])


def all_ids(reads: Reads, filters: dict[str, Any], limit: int, seconds: float = 5.0) -> list[int]:
    ids: list[int] = []
    after: int | None = 0
    while after is not None:
        page = reads.ids_matching(filters, after_id=after, limit=limit, seconds=seconds)
        assert page.next_after is None or page.next_after > after
        ids += page.ids
        after = page.next_after
    return ids


def mixed(fleet: Fleet) -> None:
    """Some two hundred tasks of every state, kind, batch and name, with a hole where retention deleted."""
    fleet.add_device("d1")
    for number in range(12):
        fleet.now += 60
        ids = fleet.submit(
            16, task_type=("crawl", "app_sync")[number % 2], batch=("", "one", "two")[number % 3],
            username=(None, "wang", "li")[number % 3], app_id=(None, "com.a", "com.b", "org.c")[number % 4],
        )  # fmt: skip
        fleet.submit(2, run_at=fleet.now + 1e6, batch="later", parent_id=ids[0])
        fleet.submit(1, unique_key=f"https://example.org/{number}", batch="keys")
        for task_id in ids[:5]:
            fleet.finish(task_id, result='{"n": 1}')
        fleet.finish(ids[5], "failed", can_retry=False, error_message="no")
        fleet.assign(ids[6], "d1")
        fleet.report("d1", fleet.assign(ids[7], "d1"), "running")
        with fleet.transaction() as tx:
            db.cancel(tx, ids[8])
    with fleet.transaction() as tx:
        gone = "id BETWEEN 77 AND 100 AND status = 'completed' RETURNING task_type, batch, status"
        rows = tx.execute(f"DELETE FROM af_crawl_tasks WHERE {gone}").fetchall()
        assert len(rows) == 10
        for task_type, batch, status in rows:
            tx.count(task_type, batch, status, -1)


FILTERS: list[dict[str, Any]] = [
    {}, {"status": ("pending",)}, {"status": ("running",)}, {"status": ("assigned", "running")},
    {"status": ("failed",)},
    {"status": ("scheduled", "failed")}, {"status": ("completed",)}, {"status": ("completed", "failed")},
    {"status": ("cancelled",)}, {"task_type": "app_sync"}, {"task_type": "nothing"}, {"batch": "one"},
    {"batch": "none"},
    {"batch": "one", "status": ("failed",)}, {"batch": "two", "status": ("completed",)}, {"username": "wang"},
    {"username": "li", "app_id": "com.a"}, {"app_id": "org.c", "batch": "one"}, {"device_id": "d1"},
    {"device_id": "d1", "status": ("running",)}, {"text": "com."}, {"text": "wan"}, {"text": "https://example.org/1"},
    {"text": "%"}, {"text": "w_ng"}, {"parent_id": 1}, {"created_after": START + 300}, {"created_before": START + 300},
    {"created_after": START + 200, "created_before": START + 400, "status": ("completed",)},
    {"status": ("failed", "cancelled", "running")}, {"status": ("scheduled", "assigned")},
    {"device_id": "d1", "status": ("pending", "failed")}, {"device_id": "d1", "status": ("scheduled",)},
    {"device_id": "d1", "username": "wang", "task_type": "app_sync"}, {"text": "wan", "status": ("failed", "running")},
    {"text": "com.", "batch": "two"}, {"task_type": "crawl", "app_id": "com.a", "status": ("cancelled", "completed")},
    {"created_after": START + 1e6}, {"created_before": START - 1}, {"created_after": START + 400, "batch": "two"},
]  # fmt: skip


def expected_ids(fleet: Fleet, filters: dict[str, Any]) -> list[int]:
    """The same by a plain look at every row: the slow truth."""
    fleet.connection.row_factory = sqlite3.Row
    rows = [dict(row) for row in fleet.connection.execute("SELECT * FROM af_crawl_tasks ORDER BY id")]
    fleet.connection.row_factory = None

    def matches(row: dict[str, Any]) -> bool:
        same = {"task_type", "batch", "username", "app_id", "parent_id"}
        texts = [row[name] for name in ("unique_key", "username", "app_id") if row[name]]
        return (
            all(row[name] == filters[name] for name in same & set(filters))
            and row["assigned_device_id"] == filters.get("device_id", row["assigned_device_id"])
            and row["status"] in filters.get("status", db.STATES)
            and filters.get("created_after", 0) <= row["created_at"] <= filters.get("created_before", 1e12)
            and ("text" not in filters or any(text.startswith(filters["text"]) for text in texts))
        )

    return [row["id"] for row in rows if matches(row)]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("reads") / "filled.db")
    mixed(made)
    yield made
    made.reads.close()
    made.connection.close()


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("few", [listing.FEW, -1])
def test_every_walk_finds_each_matching_task_once_in_order(
    filled: Fleet, filters: dict[str, Any], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "FEW", few)
    monkeypatch.setattr(listing, "FIRST_WINDOW", 7)
    expected = expected_ids(filled, filters)
    assert all_pages(filled.reads, filters, limit=10) == expected[::-1]
    assert all_ids(filled.reads, filters, limit=10) == expected
    assert [task["id"] for task in filled.reads.export(filters, page=10)] == expected
    assert filled.reads.count(filters, seconds=5.0) == Counted(len(expected), False)


@pytest.mark.parametrize("filters", [{}, {"batch": "one"}, {"text": "zzz"}, {"status": ("failed",)}], ids=str)
def test_a_walk_without_any_time_still_gets_on_and_to_the_end(
    filled: Fleet, filters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "FEW", -1)
    monkeypatch.setattr(listing, "FIRST_WINDOW", 5)
    assert all_pages(filled.reads, filters, limit=50, seconds=0.0) == expected_ids(filled, filters)[::-1]
    assert all_ids(filled.reads, filters, limit=50, seconds=0.0) == expected_ids(filled, filters)
    first = filled.reads.task_page({"text": "zzz"}, seconds=0.0)
    assert (first["tasks"], first["partial"]) == ([], True)


def test_the_shortest_way_ends_a_walk_however_long_the_others_are(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIRST_WINDOW", "SMALLEST_WINDOW", "LARGEST_WINDOW"):
        monkeypatch.setattr(listing, name, 10)
    fleet.add_device("d1")
    (needle,) = fleet.submit(username="li", unique_key="needle")
    fleet.finish(needle, "failed", can_retry=False)
    for task_id in fleet.submit(200, username="wang"):
        fleet.finish(task_id, "failed", can_retry=False)
    fleet.submit(200, username="li")
    steps: list[int] = []
    advance = listing._Walker.advance
    monkeypatch.setattr(listing._Walker, "advance", lambda self, limit: (steps.append(1), advance(self, limit)))
    of_device = {"device_id": "d1", "task_type": "crawl"}
    for filters in (
        {"username": "wang", "status": ("cancelled",), **of_device},
        {"username": "nobody", "status": ("failed",), **of_device},
        {"text": "needle", "username": "li", "status": ("failed",), **of_device},
    ):
        steps.clear()
        page = fleet.reads.task_page(filters, seconds=60.0)
        assert not page["partial"] and len(steps) <= 5
        assert [task["id"] for task in page["tasks"]] == ([needle] if "text" in filters else [])


def test_lanes_come_in_pages_that_look_at_a_bounded_number(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "LANES_LOOKED_AT", 4)
    for number in range(20):
        fleet.submit(batch=f"b{number}", run_at=fleet.now + 1e6 if number % 10 else None)
    for task_type, found in (("crawl", 2), (None, 2), ("nothing", 0)):
        lanes, cursor, pages = [], None, 0
        while pages == 0 or cursor is not None:
            page = backlog.Backlog(fleet.reads).lanes(task_type=task_type, limit=50, cursor=cursor)
            lanes += page["lanes"]
            cursor = int(page["next_cursor"]) if page["next_cursor"] else None
            pages += 1
        assert [lane["batch"] for lane in lanes] == ["b10", "b0"][:found] and pages < 10
        assert found == 0 or pages > 1


def test_a_page_that_is_full_is_not_partial(filled: Fleet) -> None:
    page = filled.reads.task_page({}, limit=3)
    assert len(page["tasks"]) == 3 and page["next_cursor"] == str(page["tasks"][-1]["id"]) and not page["partial"]


def test_an_empty_database_answers_everything(fleet: Fleet) -> None:
    assert fleet.reads.task_page({}) == {"tasks": [], "next_cursor": None, "partial": False}
    assert fleet.reads.task_page({"status": ("failed",), "created_after": START})["tasks"] == []
    assert list(fleet.reads.export({})) == []
    assert fleet.reads.count({"text": "a"}) == Counted(0, False)
    assert fleet.reads.oldest_waiting(START) is None
    assert fleet.reads.overview(START, 300)["tasks"] == dict.fromkeys(db.STATES, 0)
    assert fleet.reads.task(1) is None and fleet.reads.batch("x") is None
    assert fleet.reads.device("x", START, 300) is None and fleet.reads.device_stats("x", START, 300) is None


def test_a_count_stops_at_its_cap(filled: Fleet) -> None:
    assert filled.reads.count({"username": "wang"}, cap=10) == Counted(10, True)
    assert filled.reads.count({"status": ("pending",)}, cap=10).is_capped is False  # a kept counter knows it exactly


def test_a_task_comes_as_json_has_it(fleet: Fleet) -> None:
    fleet.add_device("d1")
    (task_id,) = fleet.submit(task_data='{"url": "x"}', required_tags=("b", "a"), execution_timeout=60)
    fleet.submit(3, parent_id=task_id)
    fleet.report("d1", fleet.assign(task_id, "d1"), "failed", error_message="no", log_tail="line")
    task = fleet.reads.task(task_id)
    assert task is not None
    assert (task["task_data"], task["result"], task["children_count"]) == ({"url": "x"}, None, 3)
    assert (task["batch"], task["required_tags"], task["execution_timeout_seconds"]) == (None, ["a", "b"], 60)
    assert task["created_at"] == iso(START) and task["status"] == "scheduled" and task["next_run_at"].endswith("Z")
    assert task["attempts"][0]["error_message"] == "no" and task["attempts"][0]["log_tail"] == "line"


def test_a_lease_or_a_token_never_comes_out(filled: Fleet) -> None:
    filled.connection.execute("UPDATE af_device SET revoked_by = 'secret-revoker', boot_id = 'secret-boot'")
    lease = filled.connection.execute("SELECT lease_id FROM af_task_assignment WHERE task_id = 1").fetchone()[0]
    answers = [
        filled.reads.task(1),
        filled.reads.device_stats("d1", filled.now, 300),
        filled.reads.devices(filled.now, 300),
    ]
    text = json.dumps(answers)
    assert lease not in text and "lease_id" not in text and "secret" not in text


def test_an_export_carries_results_and_ends_at_the_newest_task_of_its_beginning(fleet: Fleet) -> None:
    fleet.add_device("d1")
    ids = fleet.submit(40)
    fleet.finish(ids[0], result='{"n": 1}')
    rows = fleet.reads.export({}, include_result=True, page=5)
    found = [next(rows)]
    fleet.submit(50)
    found += rows
    assert [row["id"] for row in found] == ids
    assert [row["result"] for row in found[:2]] == ['{"n": 1}', None]


def test_a_slow_reader_of_an_export_holds_no_connection(fleet: Fleet) -> None:
    fleet.submit(20)
    slow = [fleet.reads.export({}, include_result=True, page=5) for _ in range(5)]
    assert [next(rows)["id"] for rows in slow] == [1] * 5
    assert len(fleet.reads.task_page({})["tasks"]) == 20


def test_a_pool_in_use_says_busy_after_a_bounded_wait_and_recovers(fleet: Fleet) -> None:
    with fleet.reads._connection(), fleet.reads._connection(), pytest.raises(ReadsBusy):
        fleet.reads.counts_by_state()
    assert fleet.reads.counts_by_state()["pending"] == 0


def test_a_query_that_fails_gives_its_connection_back(fleet: Fleet) -> None:
    for _ in range(5):
        with pytest.raises(sqlite3.Error):
            fleet.reads._all_rows("SELECT nothing")
    assert fleet.reads.counts_by_state()["pending"] == 0


def test_reads_cannot_write(fleet: Fleet) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        fleet.reads._all_rows("DELETE FROM af_crawl_tasks")


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(peewee.OperationalError):
        Reads(tmp_path / "none.db").counts_by_state()
    assert list(tmp_path.iterdir()) == []


def test_threads_share_the_pool(filled: Fleet) -> None:
    found: list[int] = []
    reads = Reads(filled.reads._path, connections=2, wait_seconds=30)

    def ask() -> None:
        for _ in range(10):
            found.append(len(reads.task_page({}, limit=5, seconds=5.0)["tasks"]))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    reads.close()
    assert found == [5] * 80
    with pytest.raises(ReadsBusy):
        reads.counts_by_state()


def test_hostile_text_is_only_text(filled: Fleet) -> None:
    before = filled.reads.counts_by_state()
    for text in ("'; DROP TABLE af_crawl_tasks; --", '" OR 1=1 --', "%", "\U0010ffff"):
        for name in ("batch", "username", "task_type", "text", "device_id"):
            assert filled.reads.task_page({name: text}, seconds=5.0)["tasks"] == []
    assert filled.reads.task_page({"status": ("') OR 1=1 --",)}, seconds=5.0)["tasks"] == []
    assert filled.reads.counts_by_state() == before


# -- counts, batches, devices


def test_batches_come_newest_first_in_pages_with_their_counts(fleet: Fleet) -> None:
    for number in range(5):
        fleet.submit(number + 1, batch=f"b{number}")
    first = fleet.reads.batches(limit=3)
    rest = fleet.reads.batches(limit=3, cursor=int(first["next_cursor"]))
    assert [batch["name"] for batch in first["batches"] + rest["batches"]] == ["b4", "b3", "b2", "b1", "b0"]
    assert rest["next_cursor"] is None
    assert first["batches"][0]["counts"] == {**dict.fromkeys(db.STATES, 0), "pending": 5}
    assert fleet.reads.batch("b1") == rest["batches"][0]


def test_counters_of_several_writers_are_summed(fleet: Fleet) -> None:
    fleet.submit(3, batch="b")
    fleet.connection.execute(
        "INSERT INTO af_count VALUES (7, 'batch', 'b', 'pending', -1), (7, 'all', '', 'pending', -1)"
    )
    assert fleet.reads.count({"batch": "b"}).count == 2
    assert fleet.reads.counts_by_state()["pending"] == 2


@pytest.mark.parametrize(
    ("wanted", "conflict", "silent", "held", "status"),
    [
        ("active", False, 0.0, 0, "online"),
        ("active", False, 299.9, 1, "online"),
        ("active", False, 0.0, 2, "busy"),
        ("active", False, 0.0, 3, "busy"),
        ("active", False, 300.0, 2, "offline"),
        ("active", False, None, 0, "offline"),
        ("draining", False, 1.0, 2, "draining"),
        ("draining", False, 400.0, 0, "offline"),
        ("active", True, 1.0, 0, "conflict"),
        ("disabled", True, None, 0, "disabled"),
    ],
)
def test_a_devices_status_follows_from_what_is_wanted_and_its_silence(
    wanted: str, conflict: bool, silent: float | None, held: int, status: str
) -> None:
    assert device_status(wanted, conflict, silent, held, 2, 300.0) == status


def test_devices_are_listed_filtered_and_counted_alike(fleet: Fleet) -> None:
    fleet.add_device("busy", tags='["gpu"]')
    fleet.add_device("idle", task_types='["app_sync"]')
    fleet.add_device("gone", last_heartbeat_at=START - 301)
    (task_id,) = fleet.submit()
    fleet.assign(task_id, "busy")
    devices = fleet.reads.devices(START, 300)
    assert {device["device_id"]: device["status"] for device in devices} == {
        "busy": "busy", "gone": "offline", "idle": "online",
    }  # fmt: skip
    assert devices[0]["assigned_count"] == 1 and devices[1]["seconds_since_heartbeat"] == 301.0
    assert [device["device_id"] for device in fleet.reads.devices(START, 300, status="offline")] == ["gone"]
    assert [device["device_id"] for device in fleet.reads.devices(START, 300, task_type="app_sync")] == ["idle"]
    assert [device["device_id"] for device in fleet.reads.devices(START, 300, tag="gpu")] == ["busy"]
    counted = {**dict.fromkeys(DEVICE_STATES, 0), "busy": 1, "offline": 1, "online": 1}
    assert fleet.reads.devices_by_status(START, 300) == counted
    assert fleet.reads.device("busy", START, 300) == devices[0]


def test_minutes_are_sixty_in_a_row_and_add_up(fleet: Fleet) -> None:
    fleet.add_device("d1")
    for task_id in fleet.submit(3):
        fleet.finish(task_id, duration_seconds=2.0)
    fleet.now += 120
    fleet.finish(fleet.submit()[0], "failed", can_retry=False)
    stats = fleet.reads.device_stats("d1", fleet.now, 300)
    assert stats is not None
    assert len(stats["last_hour"]) == 60 and stats["last_hour"][-1]["failed"] == 1
    assert stats["last_hour"][-3]["completed"] == 3 and stats["last_hour"][-3]["duration_seconds"] == 6.0
    assert (stats["success_rate"], stats["average_duration_seconds"]) == (0.75, 2.0)
    assert [attempt["status"] for attempt in stats["recent_failures"]] == ["failed"]
    rates = fleet.reads.rates(fleet.now)
    assert (rates["completed_last_hour"], rates["failed_last_hour"], rates["failed_last_minute"]) == (3, 1, 0)
    assert fleet.reads.rates(fleet.now + 60)["failed_last_minute"] == 1


@pytest.mark.parametrize(
    ("reason", "seconds", "is_told"),
    [("all_busy", 599, False), ("all_busy", 600, True), ("no_device_runs_type", 59, False), ("no_device", 60, True)],
)
def test_a_long_wait_is_told_and_sooner_where_no_time_mends_it(
    fleet: Fleet, reason: str, seconds: float, is_told: bool
) -> None:
    oldest = {"task_id": 7, "waiting_seconds": float(seconds), "reason": reason, "detail": "start one"}
    rates = {"failed_last_hour": 0, "completed_last_hour": 0}
    overview = {"rates": rates, "paused": [], "oldest_waiting": oldest}
    items = Attention(fleet.reads, 300.0).items(START, START, overview)
    assert [item["kind"] for item in items] == ["oldest_waiting"] * is_told


def test_the_oldest_waiting_task_is_found_across_lanes_and_priorities(fleet: Fleet) -> None:
    (first,) = fleet.submit(priority=1, task_type="slow")
    fleet.now += 50
    fleet.submit(5, priority=10)
    assert fleet.reads.oldest_waiting(START + 60) == {"task_id": first, "waiting_seconds": 60.0}


def test_stats_can_be_narrowed(filled: Fleet) -> None:
    whole = filled.reads.tasks_stats(filled.now)
    assert whole["by_state"] == filled.reads.counts_by_state()
    assert sum(whole["by_type"]["app_sync"].values()) + sum(whole["by_type"]["crawl"].values()) == sum(
        whole["by_state"].values()
    )
    assert whole["by_device"]["d1"] == {"assigned": 24, "completed": 60, "failed": 12, "lost": 0}
    one = filled.reads.tasks_stats(filled.now, batch="one")
    assert one["by_state"] == one["by_batch"]["one"] and one["last_hour"] == []
    assert filled.reads.tasks_stats(filled.now, task_type="crawl")["last_hour"][-1]["completed"] >= 0


# -- what others say about the same rows


def test_the_columns_are_those_of_the_schema() -> None:
    assert list(schema.CrawlTask._meta.sorted_field_names) == list(TASK_COLUMNS)


def test_the_document_describes_the_rows_that_come_out(filled: Fleet) -> None:
    def fields(type_: Any) -> set[str]:
        return set(type_.__struct_fields__)

    task = filled.reads.task(1)
    assert task is not None
    assert set(filled.reads.task_page({})["tasks"][0]) == fields(openapi.TaskOut)
    assert {*task, "waiting", "artifacts"} == fields(openapi.TaskDetailOut)
    assert set(task["attempts"][0]) == fields(openapi.AttemptOut)
    assert set(filled.reads.devices(filled.now, 300)[0]) == fields(openapi.DeviceOut)
    stats = filled.reads.device_stats("d1", filled.now, 300)
    assert stats is not None and set(stats) == fields(openapi.DeviceStatsOut)
    assert set(stats["totals"]) == fields(openapi.DeviceTotalsOut)
    assert set(stats["last_hour"][0]) == fields(openapi.MinuteOut)
    assert {*filled.reads.batches()["batches"][0], "rate_per_second"} == fields(openapi.BatchOut)
    assert set(filled.reads.tasks_stats(filled.now)) == fields(openapi.TasksStatsOut)
    assert set(filled.reads.overview(filled.now, 300)) < fields(replies.OverviewOut)


def test_the_document_is_made_from_the_types_and_the_table() -> None:
    document = openapi.build(
        [
            openapi.Operation("POST", "/tasks", "submitter", "Submit", (wire.TaskIn, wire.TasksIn),
                              openapi.SubmittedOut, status=201),
            openapi.Operation("GET", "/tasks", "viewer", "List", None, openapi.TaskPageOut,
                              openapi.FILTERS + openapi.PAGE),
            openapi.Operation("PUT", "/tasks/{task_id}/status", "device", "Report", wire.StatusIn, openapi.StatusOut),
            openapi.Operation("POST", "/login", "public", "Log in", wire.LoginIn, status=204),
        ],
        version="1",
    )  # fmt: skip
    paths = document["paths"]
    assert paths["/api/distribution/tasks"]["post"]["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert paths["/api/distribution/tasks/{task_id}/status"]["put"]["parameters"][0]["schema"]["type"] == "integer"
    assert "410" in paths["/api/distribution/tasks/{task_id}/status"]["put"]["responses"]
    assert "security" not in paths["/api/distribution/login"]["post"]
    priority = document["components"]["schemas"]["TaskIn"]["properties"]["priority"]
    assert (priority["minimum"], priority["maximum"], priority["default"]) == (1, 10, 5)
    names = json.dumps(document)
    assert all(f"#/components/schemas/{name}" not in names or name in document["components"]["schemas"]
               for name in ("TaskIn", "TaskOut", "Problem"))  # fmt: skip
    operations = [operation for path in paths.values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert {operation["x-role"] for operation in operations} <= {*ROLES, "public"}


def test_metrics_show_what_the_reads_show(filled: Fleet) -> None:
    gauges = {"af_writer_queue": ("Waiting writes.", lambda: 3.0)}
    metrics = Metrics(filled.reads, now=lambda: filled.now, device_timeout=300, version="1", gauges=gauges)
    text = metrics.render().decode()
    assert f'af_tasks{{state="completed"}} {float(filled.reads.counts_by_state()["completed"])}' in text
    assert 'af_devices{status="offline"} 1.0' in text
    assert 'af_attempts_total{outcome="completed"} 60.0' in text
    assert "af_writer_queue 3.0" in text
    assert metrics.render().decode().count("af_build_info{") == 1
