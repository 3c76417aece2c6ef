"""What tables are there, and which rows are impossible? Peewee models; every verb over them is in db.py.

Moments (`*_at`) are seconds since the epoch, UTC, as REAL; durations end in `_seconds`. State changes touch the small
hot row only: task_data and results live beside it, one to one. The partial indexes are the queues.
"""

from __future__ import annotations

from peewee import (
    SQL,
    AutoField,
    BooleanField,
    Check,
    CompositeKey,
    DoubleField,
    IntegerField,
    Model,
    Proxy,
    SqliteDatabase,
    TextField,
)

APPLICATION_ID = 0x41464431
"""PRAGMA application_id of our files: "AFD1"."""
SCHEMA_VERSION = 5
TASK_STATES = ("scheduled", "pending", "assigned", "running", "completed", "failed", "cancelled")
ATTEMPT_STATES = ("assigned", "running", "completed", "failed", "snoozed", "timeout", "released", "cancelled")
EVENT_KINDS = ("device", "task", "batch", "system", "access")
KEY_ROLES = ("viewer", "submitter", "operator", "admin", "enroll", "device")
ACTIVE = "'assigned', 'running'"
FAILURES_TO_PROBATION = 5
"""A device that fails so many tasks in a row gets one at a time until it succeeds."""

database_proxy = Proxy()


def _autoincrement() -> AutoField:
    return AutoField(constraints=[SQL("AUTOINCREMENT")])


def _one_of(column: str, *values: str) -> str:
    """`column IN (...)` in the form that SQLite checks fast: for an IN list it builds a table at every write."""
    return " OR ".join(f"{column} = '{value}'" for value in values)


class Table(Model):
    class Meta:
        database = database_proxy
        legacy_table_names = False


class CrawlTask(Table):
    id = _autoincrement()
    task_type = TextField()
    username = TextField(null=True)
    app_id = TextField(null=True)
    start_date = TextField(null=True)
    end_date = TextField(null=True)
    status = TextField()
    priority = IntegerField(default=5, constraints=[Check("priority BETWEEN 1 AND 10")])
    lane_id = IntegerField()
    batch = TextField(default="", constraints=[SQL("DEFAULT ''")])
    unique_key = TextField(null=True)
    parent_id = IntegerField(null=True)
    next_run_at = DoubleField(null=True)
    give_up_at = DoubleField()
    execution_timeout = IntegerField()
    max_retry_count = IntegerField()
    retry_count = IntegerField(constraints=[SQL("DEFAULT 0")])
    lost_count = IntegerField(constraints=[SQL("DEFAULT 0")])
    snooze_count = IntegerField(constraints=[SQL("DEFAULT 0")])
    attempt_count = IntegerField(constraints=[SQL("DEFAULT 0")])
    required_tags = TextField(constraints=[SQL("DEFAULT '[]'")])
    pinned_device_id = TextField(null=True)
    prefer_device_id = TextField(null=True)
    same_device_as = TextField(null=True)
    prefer_seconds = DoubleField(null=True)
    avoid_device_id = TextField(null=True)
    assigned_device_id = TextField(null=True)
    assignment_id = IntegerField(null=True)
    end_reason = TextField(null=True)
    error_message = TextField(null=True)
    created_by = TextField(null=True)
    created_at = DoubleField()
    started_at = DoubleField(null=True)
    finished_at = DoubleField(null=True)
    updated_at = DoubleField()

    class Meta:
        table_name = "af_crawl_tasks"
        constraints = [
            Check(_one_of("status", *TASK_STATES)),
            Check(f"({_one_of('status', 'completed', 'failed', 'cancelled')}) = (finished_at IS NOT NULL)"),
            Check("(status = 'scheduled') = (next_run_at IS NOT NULL)"),
            Check("(status <> 'assigned' AND status <> 'running') OR assignment_id IS NOT NULL"),
        ]


class TaskPayload(Table):
    task_id = IntegerField(primary_key=True)
    task_data = TextField()

    class Meta:
        table_name = "af_task_payload"


class TaskResult(Table):
    task_id = IntegerField(primary_key=True)
    result = TextField()

    class Meta:
        table_name = "af_task_result"


class TaskAssignment(Table):
    id = _autoincrement()
    task_id = IntegerField()
    device_id = TextField()
    lease_id = TextField()
    status = TextField(constraints=[SQL("DEFAULT 'assigned'")])
    pull_seq = IntegerField(null=True)
    assigned_at = DoubleField()
    delivered_at = DoubleField(null=True)
    started_at = DoubleField(null=True)
    completed_at = DoubleField(null=True)
    deadline_at = DoubleField(null=True)
    duration_seconds = DoubleField(null=True)
    progress = DoubleField(null=True)
    error_message = TextField(null=True)
    error_type = TextField(null=True)
    log_tail = TextField(null=True)
    late_outcome = TextField(null=True)
    late_at = DoubleField(null=True)
    progress_message = TextField(null=True)

    class Meta:
        table_name = "af_task_assignment"
        constraints = [
            Check(_one_of("status", *ATTEMPT_STATES)),
        ]


class Artifact(Table):
    """A file of one attempt, which lies beside the database; `dropped` once its task is deleted."""

    artifact_id = _autoincrement()
    task_id = IntegerField()
    assignment_id = IntegerField()
    name = TextField()
    bytes = IntegerField()
    sha256 = TextField()
    created_at = DoubleField()
    dropped = BooleanField(constraints=[SQL("DEFAULT 0")])

    class Meta:
        table_name = "af_artifact"
        indexes = ((("assignment_id", "name"), True),)


class Device(Table):
    device_id = TextField(primary_key=True)
    device_name = TextField()
    given_name = TextField(null=True)
    device_type = TextField(null=True)
    ip_address = TextField(null=True)
    wanted = TextField(constraints=[SQL("DEFAULT 'active'"), Check("wanted IN ('active', 'draining', 'disabled')")])
    wanted_reason = TextField(null=True)
    conflict = BooleanField(constraints=[SQL("DEFAULT 0")])
    task_types = TextField(constraints=[SQL("DEFAULT '[]'")])
    tags = TextField(constraints=[SQL("DEFAULT '[]'")])
    weight = DoubleField(constraints=[SQL("DEFAULT 1")])
    max_concurrent_tasks = IntegerField(constraints=[SQL("DEFAULT 1")])
    boot_id = TextField(null=True)
    recent_boots = TextField(constraints=[SQL("DEFAULT '[]'")])
    revoked_by = TextField(null=True)
    version = TextField(null=True)
    protocol = IntegerField(null=True)
    last_heartbeat_at = DoubleField(null=True)
    heartbeat_seq = IntegerField(constraints=[SQL("DEFAULT 0")])
    cpu_usage = DoubleField(null=True)
    memory_usage = DoubleField(null=True)
    disk_usage = DoubleField(null=True)
    active_tasks = IntegerField(null=True)
    system_info = TextField(null=True)
    problem = TextField(null=True)
    clock_skew_seconds = DoubleField(null=True)
    last_finished_at = DoubleField(null=True)
    registered_at = DoubleField()
    consecutive_failures = IntegerField(constraints=[SQL("DEFAULT 0")])
    completed_count = IntegerField(constraints=[SQL("DEFAULT 0")])
    failed_count = IntegerField(constraints=[SQL("DEFAULT 0")])
    lost_count = IntegerField(constraints=[SQL("DEFAULT 0")])
    total_duration_seconds = DoubleField(constraints=[SQL("DEFAULT 0")])

    class Meta:
        table_name = "af_device"


class DeviceHeartbeat(Table):
    id = _autoincrement()
    device_id = TextField()
    heartbeat_at = DoubleField()
    cpu_usage = DoubleField(null=True)
    memory_usage = DoubleField(null=True)
    disk_usage = DoubleField(null=True)
    active_tasks = IntegerField(null=True)
    system_info = TextField(null=True)

    class Meta:
        table_name = "af_device_heartbeat"


class Lane(Table):
    """What waiting tasks share that decides where and when they may go. `shape` names the limits that it was made
    under (their ids), `limit_keys` holds the tasks' value for each of them."""

    id = _autoincrement()
    task_type = TextField()
    required_tags = TextField()
    pinned_device_id = TextField()
    prefer_device_id = TextField()
    same_device_as = TextField()
    prefer_seconds = DoubleField()
    batch = TextField()
    shape = TextField()
    limit_keys = TextField()
    waiting = IntegerField(constraints=[SQL("DEFAULT 0"), Check("waiting >= 0")])
    unfinished = IntegerField(constraints=[SQL("DEFAULT 0"), Check("unfinished >= waiting")])
    top_priority = IntegerField(null=True)
    paused = BooleanField(constraints=[SQL("DEFAULT 0")])
    paused_reason = TextField(null=True)
    is_held = BooleanField(constraints=[SQL("DEFAULT 0")])
    is_stale = BooleanField(constraints=[SQL("DEFAULT 0")])
    closed_by = IntegerField(null=True)
    last_served = IntegerField(constraints=[SQL("DEFAULT 0")])

    class Meta:
        table_name = "af_lane"


class Limit(Table):
    id = _autoincrement()
    name = TextField()
    task_type = TextField()
    fields = TextField()
    max_running = IntegerField(null=True)
    max_starts = IntegerField(null=True)
    window_seconds = DoubleField(null=True)
    max_starts_per_day = IntegerField(null=True)

    class Meta:
        table_name = "af_limit"
        constraints = [Check("(max_starts IS NULL) = (window_seconds IS NULL)")]


class LimitKey(Table):
    """One value of a limit's key (an account, a host): how many of its tasks run, and what closes it."""

    id = _autoincrement()
    limit_id = IntegerField()
    value = TextField()
    running = IntegerField(constraints=[SQL("DEFAULT 0"), Check("running >= 0")])
    is_full = BooleanField(constraints=[SQL("DEFAULT 0")])
    look_at = DoubleField(null=True)
    closed_until = DoubleField(null=True)
    closed_reason = TextField(null=True)

    class Meta:
        table_name = "af_limit_key"


class LaneKey(Table):
    lane_id = IntegerField()
    key_id = IntegerField()

    class Meta:
        table_name = "af_lane_key"
        primary_key = CompositeKey("lane_id", "key_id")


class LimitStart(Table):
    """How many tasks of a key were started in one piece of its window, or on one day."""

    key_id = IntegerField()
    span = TextField()
    slot = IntegerField()
    n = IntegerField()
    last_at = DoubleField()
    forget_at = DoubleField()

    class Meta:
        table_name = "af_limit_start"
        primary_key = CompositeKey("key_id", "span", "slot")
        constraints = [Check("span = 'window' OR span = 'day'")]


class Pause(Table):
    """What a person holds back besides batches and lanes: everything, or a task type."""

    scope = TextField()
    name = TextField()
    reason = TextField(null=True)
    paused_at = DoubleField()

    class Meta:
        table_name = "af_pause"
        primary_key = CompositeKey("scope", "name")
        constraints = [Check("scope = 'all' OR scope = 'type'")]


class Affinity(Table):
    """Which device served this same_device_as last."""

    name = TextField(primary_key=True)
    device_id = TextField()
    served_at = DoubleField()

    class Meta:
        table_name = "af_affinity"


class Batch(Table):
    name = TextField(primary_key=True)
    state = TextField(constraints=[SQL("DEFAULT 'open'"), Check("state IN ('open', 'paused', 'cancelled')")])
    reason = TextField(null=True)
    created_at = DoubleField()

    class Meta:
        table_name = "af_batch"


# The three tables below have rowids on purpose: SQLite 3.40's quick_check sees NULL in every sound row of a table
# WITHOUT ROWID that has a key of several columns, and the master would refuse its own file at the next start.


class Count(Table):
    writer_id = IntegerField()
    scope = TextField()
    name = TextField()
    state = TextField()
    n = IntegerField()

    class Meta:
        table_name = "af_count"
        primary_key = CompositeKey("writer_id", "scope", "name", "state")


class _Rollup(Table):
    scope = TextField()
    name = TextField()
    completed = IntegerField()
    failed = IntegerField()
    lost = IntegerField()
    snoozed = IntegerField()
    duration_seconds = DoubleField()
    duration_max_seconds = DoubleField()


class Minute(_Rollup):
    minute_at = IntegerField()

    class Meta:
        table_name = "af_minute"
        primary_key = CompositeKey("minute_at", "scope", "name")


class Hour(_Rollup):
    hour_at = IntegerField()

    class Meta:
        table_name = "af_hour"
        primary_key = CompositeKey("hour_at", "scope", "name")


class Event(Table):
    """What happened, for those who ask later: everything but the routine life of a task. `facts` is JSON."""

    id = _autoincrement()
    at = DoubleField()
    kind = TextField(constraints=[Check(_one_of("kind", *EVENT_KINDS))])
    verb = TextField()
    device_id = TextField(null=True)
    facts = TextField()

    class Meta:
        table_name = "af_event"


class AccessKey(Table):
    """A key that programs and persons send. `digest` is the sha256 of its text, which nobody keeps."""

    id = _autoincrement()
    name = TextField()
    role = TextField(constraints=[Check(_one_of("role", *KEY_ROLES))])
    digest = TextField()
    device_id = TextField(null=True)
    created_at = DoubleField()
    created_by = TextField()
    expires_at = DoubleField(null=True)
    uses_left = IntegerField(null=True)
    last_used_at = DoubleField(null=True)
    last_used_from = TextField(null=True)
    revoked_at = DoubleField(null=True)
    giver_id = IntegerField(null=True)

    class Meta:
        table_name = "af_key"
        constraints = [
            Check("(role = 'device') = (device_id IS NOT NULL)"),
            Check("(role = 'enroll') = (uses_left IS NOT NULL)"),
            Check("uses_left IS NULL OR uses_left >= 0"),
        ]


class Audit(Table):
    """Who did what, from where, and with which outcome: "ok", or the code of the refusal. `detail` is JSON."""

    id = _autoincrement()
    at = DoubleField()
    actor = TextField()
    role = TextField(null=True)
    key_id = IntegerField(null=True)
    address = TextField()
    action = TextField()
    object = TextField(null=True)
    outcome = TextField()
    detail = TextField()

    class Meta:
        table_name = "af_audit"


class Meta(Table):
    key = TextField(primary_key=True)
    value = TextField()

    class Meta:
        table_name = "af_meta"


TABLES = (
    CrawlTask, TaskPayload, TaskResult, TaskAssignment, Artifact, Device, DeviceHeartbeat, Lane, Limit, LimitKey,
    LaneKey, LimitStart, Pause, Affinity, Batch, Count, Minute, Hour, Event, AccessKey, Audit, Meta,
)  # fmt: skip

INDEXES = f"""
CREATE INDEX task_queue ON af_crawl_tasks (lane_id, priority DESC, id) WHERE status = 'pending';
CREATE INDEX task_due ON af_crawl_tasks (next_run_at) WHERE status = 'scheduled';
CREATE UNIQUE INDEX task_key ON af_crawl_tasks (unique_key, batch) WHERE unique_key IS NOT NULL;
CREATE INDEX task_batch ON af_crawl_tasks (batch, id) WHERE batch <> '';
CREATE INDEX task_children ON af_crawl_tasks (parent_id, id) WHERE parent_id IS NOT NULL;
CREATE INDEX task_username ON af_crawl_tasks (username, id) WHERE username IS NOT NULL;
CREATE INDEX task_app ON af_crawl_tasks (app_id, id) WHERE app_id IS NOT NULL;
CREATE INDEX task_finished ON af_crawl_tasks (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX task_type ON af_crawl_tasks (task_type, id);
CREATE INDEX task_state ON af_crawl_tasks (status, id) WHERE status <> 'assigned' AND status <> 'running';
CREATE INDEX attempt_task ON af_task_assignment (task_id, id);
CREATE UNIQUE INDEX attempt_active ON af_task_assignment (task_id) WHERE status IN ({ACTIVE});
CREATE INDEX attempt_holder ON af_task_assignment (device_id, id) WHERE status IN ({ACTIVE});
CREATE INDEX attempt_deadline ON af_task_assignment (deadline_at) WHERE status IN ({ACTIVE});
CREATE INDEX attempt_device ON af_task_assignment (device_id, task_id);
CREATE INDEX attempt_failed ON af_task_assignment (device_id, id) WHERE status = 'failed' OR status = 'timeout';
CREATE INDEX artifact_task ON af_artifact (task_id, artifact_id) WHERE dropped = 0;
CREATE INDEX artifact_dropped ON af_artifact (artifact_id) WHERE dropped = 1;
CREATE UNIQUE INDEX lane_place ON af_lane (task_type, batch, limit_keys, shape, required_tags, pinned_device_id,
 prefer_device_id, same_device_as, prefer_seconds);
CREATE INDEX lane_open ON af_lane (task_type, top_priority DESC, last_served, id)
 WHERE waiting > 0 AND paused = 0 AND is_held = 0 AND is_stale = 0 AND closed_by IS NULL;
CREATE INDEX lane_waiting ON af_lane (last_served, id) WHERE waiting > 0;
CREATE INDEX lane_closed ON af_lane (closed_by, top_priority DESC, last_served) WHERE closed_by IS NOT NULL;
CREATE INDEX lane_stale ON af_lane (id) WHERE is_stale = 1 AND waiting > 0;
CREATE INDEX lane_idle ON af_lane (id) WHERE unfinished = 0 AND paused = 0;
CREATE INDEX lane_paused ON af_lane (id) WHERE paused = 1;
CREATE INDEX lane_type ON af_lane (task_type, id);
CREATE INDEX lane_batch ON af_lane (batch);
CREATE INDEX batch_paused ON af_batch (state) WHERE state = 'paused';
CREATE UNIQUE INDEX limit_name ON af_limit (name);
CREATE UNIQUE INDEX limit_key_value ON af_limit_key (limit_id, value);
CREATE INDEX limit_key_look ON af_limit_key (look_at) WHERE look_at IS NOT NULL;
CREATE INDEX lane_key_key ON af_lane_key (key_id);
CREATE INDEX device_failing ON af_device (device_id) WHERE consecutive_failures >= 5;
CREATE INDEX limit_start_age ON af_limit_start (forget_at);
CREATE INDEX affinity_age ON af_affinity (served_at);
CREATE INDEX beat_device ON af_device_heartbeat (device_id, heartbeat_at);
CREATE INDEX beat_age ON af_device_heartbeat (heartbeat_at);
CREATE INDEX event_kind ON af_event (kind, id);
CREATE INDEX event_verb ON af_event (verb, id);
CREATE INDEX event_device ON af_event (device_id, id) WHERE device_id IS NOT NULL;
CREATE INDEX key_device ON af_key (device_id) WHERE device_id IS NOT NULL AND revoked_at IS NULL;
CREATE INDEX audit_at ON af_audit (at);
CREATE INDEX audit_actor ON af_audit (actor, id);
CREATE INDEX audit_action ON af_audit (action, id);
CREATE INDEX audit_outcome ON af_audit (outcome, id);
"""

UPGRADES = {
    2: """
ALTER TABLE af_task_assignment ADD COLUMN progress_message TEXT;
ALTER TABLE af_device ADD COLUMN problem TEXT;
ALTER TABLE af_device ADD COLUMN clock_skew_seconds REAL;
CREATE TABLE "af_artifact" ("artifact_id" INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, "task_id" INTEGER NOT NULL,
  "assignment_id" INTEGER NOT NULL, "name" TEXT NOT NULL, "bytes" INTEGER NOT NULL, "sha256" TEXT NOT NULL,
  "created_at" REAL NOT NULL, "dropped" INTEGER NOT NULL DEFAULT 0);
CREATE UNIQUE INDEX "af_artifact_assignment_id_name" ON "af_artifact" ("assignment_id", "name");
CREATE INDEX artifact_task ON af_artifact (task_id, artifact_id) WHERE dropped = 0;
CREATE INDEX artifact_dropped ON af_artifact (artifact_id) WHERE dropped = 1;
""",
    3: """
ALTER TABLE af_crawl_tasks ADD COLUMN same_device_as TEXT;
ALTER TABLE af_crawl_tasks ADD COLUMN prefer_seconds REAL;
CREATE TABLE "new_lane" ("id" INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, "task_type" TEXT NOT NULL,
  "required_tags" TEXT NOT NULL, "pinned_device_id" TEXT NOT NULL, "prefer_device_id" TEXT NOT NULL,
  "same_device_as" TEXT NOT NULL, "prefer_seconds" REAL NOT NULL, "batch" TEXT NOT NULL, "shape" TEXT NOT NULL,
  "limit_keys" TEXT NOT NULL, "waiting" INTEGER NOT NULL DEFAULT 0 CHECK (waiting >= 0),
  "unfinished" INTEGER NOT NULL DEFAULT 0 CHECK (unfinished >= waiting), "top_priority" INTEGER,
  "paused" INTEGER NOT NULL DEFAULT 0, "paused_reason" TEXT, "is_held" INTEGER NOT NULL DEFAULT 0,
  "is_stale" INTEGER NOT NULL DEFAULT 0, "closed_by" INTEGER, "last_served" INTEGER NOT NULL DEFAULT 0);
INSERT INTO new_lane (id, task_type, required_tags, pinned_device_id, prefer_device_id, same_device_as, prefer_seconds,
  batch, shape, limit_keys, waiting, unfinished, top_priority, paused, paused_reason, is_held, last_served)
  SELECT id, task_type, required_tags, pinned_device_id, prefer_device_id, '',
  CASE WHEN prefer_device_id = '' THEN 0 ELSE 30 END, batch, '', '[]', waiting,
  COALESCE(counted.n, 0), top_priority, paused,
  paused_reason, COALESCE((SELECT state <> 'open' FROM af_batch WHERE name = af_lane.batch), 0), last_served
  FROM af_lane LEFT JOIN (SELECT lane_id, COUNT(*) AS n FROM af_crawl_tasks WHERE finished_at IS NULL
  GROUP BY lane_id) AS counted ON counted.lane_id = af_lane.id;
DROP TABLE af_lane;
ALTER TABLE new_lane RENAME TO af_lane;
CREATE TABLE "af_limit" ("id" INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, "name" TEXT NOT NULL,
  "task_type" TEXT NOT NULL, "fields" TEXT NOT NULL, "max_running" INTEGER, "max_starts" INTEGER,
  "window_seconds" REAL, "max_starts_per_day" INTEGER, CHECK ((max_starts IS NULL) = (window_seconds IS NULL)));
CREATE TABLE "af_limit_key" ("id" INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, "limit_id" INTEGER NOT NULL,
  "value" TEXT NOT NULL, "running" INTEGER NOT NULL DEFAULT 0 CHECK (running >= 0),
  "is_full" INTEGER NOT NULL DEFAULT 0, "look_at" REAL, "closed_until" REAL, "closed_reason" TEXT);
CREATE TABLE "af_lane_key" ("lane_id" INTEGER NOT NULL, "key_id" INTEGER NOT NULL, PRIMARY KEY ("lane_id", "key_id"));
CREATE TABLE "af_limit_start" ("key_id" INTEGER NOT NULL, "span" TEXT NOT NULL, "slot" INTEGER NOT NULL,
  "n" INTEGER NOT NULL, "last_at" REAL NOT NULL, "forget_at" REAL NOT NULL, PRIMARY KEY ("key_id", "span", "slot"),
  CHECK (span = 'window' OR span = 'day'));
CREATE TABLE "af_pause" ("scope" TEXT NOT NULL, "name" TEXT NOT NULL, "reason" TEXT, "paused_at" REAL NOT NULL,
  PRIMARY KEY ("scope", "name"), CHECK (scope = 'all' OR scope = 'type'));
CREATE TABLE "af_affinity" ("name" TEXT NOT NULL PRIMARY KEY, "device_id" TEXT NOT NULL, "served_at" REAL NOT NULL);
CREATE UNIQUE INDEX lane_place ON af_lane (task_type, batch, limit_keys, shape, required_tags, pinned_device_id,
 prefer_device_id, same_device_as, prefer_seconds);
CREATE INDEX lane_open ON af_lane (task_type, top_priority DESC, last_served, id)
 WHERE waiting > 0 AND paused = 0 AND is_held = 0 AND is_stale = 0 AND closed_by IS NULL;
CREATE INDEX lane_waiting ON af_lane (last_served, id) WHERE waiting > 0;
CREATE INDEX lane_closed ON af_lane (closed_by, top_priority DESC, last_served) WHERE closed_by IS NOT NULL;
CREATE INDEX lane_stale ON af_lane (id) WHERE is_stale = 1 AND waiting > 0;
CREATE INDEX lane_idle ON af_lane (id) WHERE unfinished = 0 AND paused = 0;
CREATE UNIQUE INDEX limit_name ON af_limit (name);
CREATE UNIQUE INDEX limit_key_value ON af_limit_key (limit_id, value);
CREATE INDEX limit_key_look ON af_limit_key (look_at) WHERE look_at IS NOT NULL;
CREATE INDEX lane_key_key ON af_lane_key (key_id);
CREATE INDEX device_failing ON af_device (device_id) WHERE consecutive_failures >= 5;
CREATE INDEX limit_start_age ON af_limit_start (forget_at);
CREATE INDEX affinity_age ON af_affinity (served_at);
""",
    4: """
ALTER TABLE af_device ADD COLUMN given_name TEXT;
CREATE TABLE "af_event" ("id" INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, "at" REAL NOT NULL, "kind" TEXT NOT NULL
  CHECK (kind = 'device' OR kind = 'task' OR kind = 'batch' OR kind = 'system' OR kind = 'access'),
  "verb" TEXT NOT NULL, "device_id" TEXT, "facts" TEXT NOT NULL);
CREATE INDEX event_kind ON af_event (kind, id);
CREATE INDEX event_verb ON af_event (verb, id);
CREATE INDEX event_device ON af_event (device_id, id) WHERE device_id IS NOT NULL;
DROP INDEX task_key;
DROP INDEX task_failed;
DROP INDEX attempt_device;
CREATE UNIQUE INDEX task_key ON af_crawl_tasks (unique_key, batch) WHERE unique_key IS NOT NULL;
CREATE INDEX task_type ON af_crawl_tasks (task_type, id);
CREATE INDEX task_state ON af_crawl_tasks (status, id) WHERE status <> 'assigned' AND status <> 'running';
CREATE INDEX attempt_device ON af_task_assignment (device_id, task_id);
CREATE INDEX attempt_failed ON af_task_assignment (device_id, id) WHERE status = 'failed' OR status = 'timeout';
CREATE INDEX lane_paused ON af_lane (id) WHERE paused = 1;
CREATE INDEX lane_type ON af_lane (task_type, id);
CREATE INDEX lane_batch ON af_lane (batch);
CREATE INDEX batch_paused ON af_batch (state) WHERE state = 'paused';
""",
    5: """
ALTER TABLE af_device RENAME COLUMN token_hash TO revoked_by;
CREATE TABLE "af_key" ("id" INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, "name" TEXT NOT NULL, "role" TEXT NOT NULL
  CHECK (role = 'viewer' OR role = 'submitter' OR role = 'operator' OR role = 'admin' OR role = 'enroll'
  OR role = 'device'), "digest" TEXT NOT NULL, "device_id" TEXT, "created_at" REAL NOT NULL, "created_by" TEXT NOT NULL,
  "expires_at" REAL, "uses_left" INTEGER, "last_used_at" REAL, "last_used_from" TEXT, "revoked_at" REAL,
  "giver_id" INTEGER, CHECK ((role = 'device') = (device_id IS NOT NULL)),
  CHECK ((role = 'enroll') = (uses_left IS NOT NULL)), CHECK (uses_left IS NULL OR uses_left >= 0));
CREATE TABLE "af_audit" ("id" INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, "at" REAL NOT NULL, "actor" TEXT NOT NULL,
  "role" TEXT, "key_id" INTEGER, "address" TEXT NOT NULL, "action" TEXT NOT NULL, "object" TEXT,
  "outcome" TEXT NOT NULL, "detail" TEXT NOT NULL);
CREATE INDEX key_device ON af_key (device_id) WHERE device_id IS NOT NULL AND revoked_at IS NULL;
CREATE INDEX audit_at ON af_audit (at);
CREATE INDEX audit_actor ON af_audit (actor, id);
CREATE INDEX audit_action ON af_audit (action, id);
CREATE INDEX audit_outcome ON af_audit (outcome, id);
""",
}
"""What makes a file of the version before into this version: the tables of a new file, reached in steps."""


def create_tables(database: SqliteDatabase) -> None:
    """Makes every table and index in one transaction, and marks the file as ours."""
    database_proxy.initialize(database)
    with database.atomic("IMMEDIATE"):
        database.create_tables(TABLES, safe=False)
        _execute_all(database, INDEXES)
        database.execute_sql(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")


def upgrade_tables(database: SqliteDatabase, version: int) -> None:
    """Takes the tables from an older version to ours, all steps in one transaction."""
    with database.atomic("IMMEDIATE"):
        for step in range(version + 1, SCHEMA_VERSION + 1):
            _execute_all(database, UPGRADES[step])
        database.execute_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _execute_all(database: SqliteDatabase, statements: str) -> None:
    for statement in filter(None, map(str.strip, statements.split(";"))):
        database.execute_sql(statement)
