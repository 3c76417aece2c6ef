/* How is the master itself, and with which settings does it run? */
import { html } from "../vendor/htm-preact.js";
import { useLive } from "../live.js";
import { Card, CurlButton, Facts, Moment, Refusal, Section, Table, Waiting } from "../parts.js";
import { may } from "../session.js";
import { bytes, duration, number, t } from "../text.js";
import { Backups } from "./backups.js";

const PATH = "/system";
const milliseconds = (latency) => (latency && latency.p50 !== null ? t("percentiles", { p50: number(latency.p50, 1), p95: number(latency.p95, 1), p99: number(latency.p99, 1) }) : null);

export function System() {
  const { data: system, problem } = useLive(PATH, 10000);
  if (!system) return problem ? html`<${Refusal} problem=${problem} />` : html`<${Waiting} />`;
  const { database, writer, http } = system;
  return html`<${Section} title=${t("system_master")} aside=${html`<div><${CurlButton} path=${PATH} /></div>`}><${Card} className="pad"><${Facts} facts=${[
      [t("version"), system.version], [t("mode"), system.mode], [t("uptime"), duration(system.uptime_seconds)], [t("started"), html`<${Moment} at=${system.started_at} />`],
      ["Python", system.python_version], ["SQLite", system.sqlite_version], [t("protocol"), system.protocol]]} /></${Card}></${Section}>
    <div class="two">
    <${Section} title=${t("database")}><${Card} className="pad"><${Facts} facts=${[
      [t("file"), database.file], [t("size"), bytes(database.bytes)], [t("wal_size"), bytes(database.wal_bytes)], [t("free_disk"), bytes(database.free_bytes)],
      [t("schema_version"), database.schema_version], [t("all_tasks"), number(database.tasks)]]} /></${Card}></${Section}>
    <${Section} title=${t("writer")}><${Card} className="pad"><${Facts} facts=${[
      [t("writer_queue"), t("of", { n: number(writer.queue), limit: number(writer.max_queue) })], [t("commits"), number(writer.commits)], [t("mean_batch"), number(writer.mean_batch, 1)], [t("commit_time"), milliseconds(writer.commit_ms)],
      [t("requests"), number(http.requests)], [t("request_time"), milliseconds(http.request_ms)], [t("held_polls"), number(http.held_polls)], [t("streams"), number(http.streams)]]} /></${Card}></${Section}></div>
    ${may("operator") && html`<${Backups} />`}
    <${Section} title=${t("retention")}><${Card} className="pad"><${Facts} facts=${[
      ...Object.entries(system.retention.settings || {}).map(([name, value]) => [name, String(value)]),
      [t("last_run"), system.retention.last_run_at ? html`<${Moment} at=${system.retention.last_run_at} />` : null], [t("last_deleted"), system.retention.deleted === null ? null : JSON.stringify(system.retention.deleted)]]} /></${Card}></${Section}>
    <${Section} title=${t("settings")}><${Table} label=${t("settings")} rows=${Object.entries(system.settings)} keyOf=${([name]) => name} columns=${[
      { name: "setting", label: t("setting"), cell: ([name]) => html`<code>${name}</code>` },
      { name: "value", label: t("value"), cell: ([, value]) => html`<code>${typeof value === "string" ? value : JSON.stringify(value)}</code>` }]} /></${Section}>`;
}
