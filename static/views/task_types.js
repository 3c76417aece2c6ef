/* Which fields has a task of each known type? As executors/*.py and docs/crawl.md, docs/appsflyer.md say; a field's help is the string help_TYPE_FIELD. */
const RAW = ["installs_report", "in_app_events_report", "uninstall_events_report", "reinstalls", "organic_installs_report", "organic_in_app_events_report", "organic_uninstall_events_report", "reinstalls_organic", "installs-retarget",
  "in-app-events-retarget", "ad_revenue_raw", "ad_revenue_organic_raw", "ad-revenue-raw-retarget", "blocked_installs_report", "blocked_in_app_events_report", "blocked_clicks_report", "blocked_install_postbacks", "detection",
  "fraud-post-inapps", "postbacks", "in-app-events-postbacks", "retarget_in_app_events_postbacks", "retarget_install_postbacks"];
const AGGREGATE = ["partners_report", "partners_by_date_report", "daily_report", "geo_report", "geo_by_date_report"];
const REPORTS = [...RAW, ...AGGREGATE];
const APP_ID = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/;

/* {at: where in the task, kind: text, url, integer, number, date, moment, choice, lines, tags, json, flag; needs: shown only with this one set} */
const data = (name, kind = "text", more = {}) => ({ at: `task_data.${name}`, kind, ...more });
const CREDENTIAL = { at: "username", kind: "text", isRequired: true, example: "acme" };

export const TYPES = {
  crawl: [
    data("url", "url", { isRequired: true, isWide: true, example: "https://example.org/" }),
    data("follow", "flag"),
    data("follow.allow", "lines", { needs: "task_data.follow", isPattern: true, example: "/en/" }), data("follow.deny", "lines", { needs: "task_data.follow", isPattern: true, example: "\\.zip$" }),
    data("follow.max_depth", "integer", { needs: "task_data.follow", min: 0, max: 1000000 }), data("follow.max_pages", "integer", { needs: "task_data.follow", min: 1, max: 100000000 }),
    data("follow.same_host", "choice", { needs: "task_data.follow", choices: [true, false] }),
    data("sitemap", "flag_or_url"), data("fields", "json", { example: '{"title": "h1"}' }), data("items", "json", { example: '{"selector": "li", "fields": {"name": "h2"}}' }), data("jmespath"), data("raw", "flag"),
    data("method", "choice", { isRare: true, choices: ["GET", "HEAD", "POST"] }), data("form", "json", { isRare: true }), data("json", "json", { isRare: true }), data("headers", "json", { isRare: true, example: '{"Accept": "text/html"}' }),
    data("timeout_seconds", "number", { isRare: true, min: 0.001, max: 3600, example: "30" }),
  ],
  data_sync: [
    CREDENTIAL, { at: "app_id", kind: "text", isRequired: true, pattern: APP_ID, example: "com.example.ferry" }, data("report", "choice", { isRequired: true, choices: REPORTS }),
    { at: "start_date", kind: "date", isRequired: true }, { at: "end_date", kind: "date", isRequired: true, notBefore: "start_date" },
    data("timezone", "text", { example: "Europe/Paris" }), data("event_name", "lines", { example: "af_purchase" }),
    ...["currency", "media_source", "category", "geo"].map((name) => data(name, "text", { isRare: true })), data("agency", "lines", { isRare: true }), data("additional_fields", "lines", { isRare: true }),
    data("maximum_rows", "choice", { isRare: true, choices: [1000000, 200000] }), data("days_per_pull", "integer", { isRare: true, min: 1, max: 999 }),
    data("from_time", "text", { isRare: true, example: "2026-11-01 00:00:00" }), data("to_time", "text", { isRare: true, example: "2026-11-01 12:00:00" }),
  ],
  app_sync: [
    CREDENTIAL, data("pull", "flag"), data("pull.reports", "choices", { needs: "task_data.pull", isRequired: true, choices: REPORTS }),
    data("pull.start_date", "date", { needs: "task_data.pull", isRequired: true }), data("pull.end_date", "date", { needs: "task_data.pull", isRequired: true, notBefore: "task_data.pull.start_date" }),
    data("pull.timezone", "text", { needs: "task_data.pull", example: "app" }), data("capabilities", "choice", { isRare: true, choices: ["protect_360", "cost"] }), data("page_size", "integer", { isRare: true, min: 1, max: 1000 }),
  ],
  echo: [
    data("sleep_seconds", "number", { min: 0 }), data("fail"), data("fail_for_good"), data("snooze_seconds", "number", { min: 0 }),
  ],
};
/* Any task may have these; help_FIELD says what they are. */
const NAME = /^[A-Za-z0-9_.-]{1,64}$/;
const COMMON = [
  { at: "batch", kind: "text", max: 128 }, { at: "unique_key", kind: "text", max: 1024 }, { at: "priority", kind: "integer", min: 1, max: 10, example: "5" },
  { at: "delay_seconds", kind: "number", min: 0, max: 31536000 }, { at: "run_at", kind: "moment" }, { at: "required_tags", kind: "tags" }, { at: "max_retry_count", kind: "integer", min: 0, max: 100 },
  { at: "execution_timeout_seconds", kind: "integer", min: 1, max: 604800 },
  { at: "username", kind: "text", isRare: true, max: 128 }, { at: "app_id", kind: "text", isRare: true, max: 128 }, { at: "start_date", kind: "date", isRare: true }, { at: "end_date", kind: "date", isRare: true, notBefore: "start_date" },
  { at: "pinned_device_id", kind: "text", isRare: true, pattern: NAME }, { at: "prefer_device_id", kind: "text", isRare: true, pattern: NAME }, { at: "same_device_as", kind: "text", isRare: true, max: 128 }, { at: "prefer_seconds", kind: "number", isRare: true, min: 0, max: 604800 },
  { at: "give_up_seconds", kind: "number", isRare: true, min: 1, max: 31536000 }, { at: "if_exists", kind: "choice", isRare: true, choices: ["return", "requeue_failed"] }, { at: "max_batch_tasks", kind: "integer", isRare: true, min: 1, max: 100000000 },
  { at: "parent_id", kind: "integer", isRare: true, min: 1 },
];
/** The fields of a type, its own first. */
export function fieldsOf(type) {
  const own = Object.hasOwn(TYPES, type) ? TYPES[type] : [], known = new Set(own.map((field) => field.at));
  return [...own.map((field) => ({ ...field, isOwn: true })), ...COMMON.filter((field) => !known.has(field.at))];
}
