/* How is this one device, what did it do, and what has it in its hands? */
import { html, useMemo, useState } from "../vendor/htm-preact.js";
import { query } from "../api.js";
import { Chart, settledPoints } from "../chart.js";
import { useLive } from "../live.js";
import { Age, Card, CurlButton, Empty, Facts, link, Moment, Pill, Refusal, Section, Table, TaskLink, Waiting } from "../parts.js";
import { duration, has, number, t } from "../text.js";
import { DeviceKey } from "./device_key.js";
import { DeviceActions, devicePath, isAway, Load, nameOf, rateWords, statusOf, Troubles, troubles } from "./device_parts.js";
import { EventTable } from "./events.js";
import { ended } from "./task_table.js";

const SHOWN = 10, GAP_BEATS = 3;

export function Device({ id }) {
  const path = devicePath(id);
  const { data: device, problem } = useLive(path);
  const { data: stats } = useLive(`${path}/stats`, 10000);
  if (problem) return html`<${Refusal} problem=${problem} /><p><a href=${link("devices")}>${t("nav_devices")}</a></p>`;
  if (!device) return html`<${Waiting} lines=${8} />`;
  const onGone = () => { location.hash = link("devices"); };
  const aside = html`<div><${DeviceActions} device=${device} onGone=${onGone} /><${CurlButton} path=${path} /></div>`;
  return html`<${Section} title=${html`<span class="row">${nameOf(device)} <${Pill} name=${statusOf(device)} /></span>`} aside=${aside}>
      ${device.wanted_reason && html`<p class="note amber">${device.wanted_reason}</p>`}
      ${troubles(device).length > 0 && html`<p class="note amber"><${Troubles} device=${device} /></p>`}
      <${Card} className="pad device-facts"><${Figures} device=${device} stats=${stats} /><${Identity} device=${device} /></${Card}>
    </${Section}>
    <${DeviceKey} device=${device} />
    <${Charts} path=${path} device=${device} />
    ${stats && html`<${LastHour} path=${path} stats=${stats} />`}
    <div class="two"><${Tasks} id=${id} />${stats && html`<${Failures} failures=${stats.recent_failures} />`}</div>
    <div class="two"><${History} id=${id} />${stats && html`<${Beats} path=${path} beats=${stats.heartbeats} />`}</div>`;
}

function Figures({ device, stats }) {
  return html`<div class="figures">
    <div class="figure"><${Load} device=${device} /><span>${t("load")}</span></div>
    <div class="figure"><b><${Age} at=${device.last_heartbeat_at} words="ago" /></b><span>${t("last_beat")}</span></div>
    <div class="figure"><b><${Age} at=${device.last_finished_at} words="ago" /></b><span>${t("last_finished")}</span></div>
    <div class="figure"><b>${rateWords(stats?.success_rate)}</b><span>${t("success")}</span></div>
    ${["completed", "failed", "lost"].map((name) => html`<div key=${name} class="figure"><b>${number(device[`${name}_count`])}</b><span>${t(name === "lost" ? "lost_tasks" : name)}</span></div>`)}
    <div class="figure"><b>${stats?.average_duration_seconds ? duration(stats.average_duration_seconds, true) : "–"}</b><span>${t("mean_duration")}</span></div></div>`;
}
/** What its worker says of it; what of it is only information is called so. */
function Identity({ device }) {
  const machine = Object.entries(device.system_info || {}).map(([name, value]) => [name.replace(/_/g, " "), typeof value === "object" ? JSON.stringify(value) : String(value)]);
  return html`<${Facts} facts=${[
    [t("device_id"), device.device_id], [t("device_type"), device.device_type], [t("address_seen"), device.ip_address], [t("version"), device.version], [t("protocol"), device.protocol],
    [t("slots"), number(device.max_concurrent_tasks)], [t("weight"), number(device.weight, 2)], [t("registered_at"), html`<${Moment} at=${device.registered_at} />`],
    [t("runs"), (device.task_types || []).join(", ")], [t("tags_has"), (device.tags || []).join(", ")], [t("failures_in_a_row"), device.consecutive_failures || ""], ...machine]} />`;
}

/** A device that was away has no points there: the line ends and begins again, instead of inventing a way. */
function withGaps(points) {
  const steps = points.slice(1).map((point, i) => Date.parse(point.at) - Date.parse(points[i].at)).sort((a, b) => a - b);
  const usual = steps[Math.floor(steps.length / 2)] || Infinity;
  return points.flatMap((point, i) => (i && Date.parse(point.at) - Date.parse(points[i - 1].at) > GAP_BEATS * usual
    ? [{ at: new Date(Date.parse(points[i - 1].at) + usual).toISOString(), cpu: null, memory: null, disk: null, active: null }, point] : [point]));
}
function Charts({ path, device }) {
  const [hours, set] = useState(1);
  const asked = `${path}/heartbeats?hours=${hours}`;
  const { data } = useLive(asked, hours === 1 ? 15000 : 60000);
  // A device that is new has hardly a point yet: its beats themselves are its first curve.
  const isNew = hours === 1 && data?.points.length < 2, beats = device.beats;
  const points = useMemo(() => (isNew ? beats : withGaps(data?.points || [])), [data, isNew && beats]);
  const at = useMemo(() => points.map((point) => point.at), [points]);
  const values = (name) => points.map((point) => point[name]);
  const choose = html`<div role="group" aria-label=${t("time_span")}>${[1, 24].map((n) => html`<button key=${n} type="button" class=${n === hours ? "main" : "plain"} aria-pressed=${n === hours} onClick=${() => set(n)}>${t(`last_${n}`)}</button>`)}
    <${CurlButton} path=${asked} /></div>`;
  const isEmpty = data && points.length < 2;
  return html`<${Section} title=${t("machine")} aside=${choose}>${!data ? html`<${Card}><${Waiting} lines=${6} /></${Card}>` : isEmpty ? html`<${Card}><${Empty}><p>${t(isAway(device) ? "no_beats_away" : "no_beats")}</p></${Empty}></${Card}>` : html`<div class="two">
    <${Card} className="pad"><h3>${t("usage_percent")}</h3><${Chart} key=${hours} label=${t("usage_percent")} at=${at} top=${100} series=${[
      { label: t("cpu"), tone: "blue", values: values("cpu"), digits: 1 }, { label: t("memory"), tone: "violet", values: values("memory"), digits: 1 }, { label: t("disk"), tone: "amber", values: values("disk"), digits: 1 }]} /></${Card}>
    <${Card} className="pad"><h3>${t("tasks_at_once")}</h3><${Chart} key=${hours} label=${t("tasks_at_once")} at=${at} series=${[{ label: t("running"), tone: "cyan", fill: true, values: values("active") }]} /></${Card}></div>`}</${Section}>`;
}
function LastHour({ path, stats }) {
  const minutes = settledPoints(stats.last_hour, (point) => point.minute);
  const at = useMemo(() => minutes.map((minute) => minute.minute), [minutes]);
  const values = (name) => minutes.map((minute) => minute[name]);
  const mean = minutes.map((minute) => (minute.completed + minute.failed ? minute.duration_seconds / (minute.completed + minute.failed) : null));
  return html`<${Section} title=${t("last_hour")} aside=${html`<div><${CurlButton} path=${`${path}/stats`} /></div>`}><div class="two">
    <${Card} className="pad"><h3>${t("by_minute")}</h3><${Chart} label=${t("by_minute")} at=${at} series=${[
      { label: t("completed"), tone: "green", fill: true, values: values("completed") }, { label: t("failed"), tone: "red", values: values("failed") }, { label: t("lost_tasks"), tone: "violet", values: values("lost") }]} /></${Card}>
    <${Card} className="pad"><h3>${t("durations")}</h3><${Chart} label=${t("durations")} at=${at} series=${[
      { label: t("mean"), tone: "blue", fill: true, values: mean, digits: 2 }, { label: t("longest"), tone: "amber", values: minutes.map((minute) => minute.duration_max_seconds || null), digits: 2 }]} /></${Card}></div></${Section}>`;
}

function Tasks({ id }) {
  const path = `/tasks${query({ device_id: id, limit: SHOWN })}`;
  const { data, problem } = useLive(path);
  const aside = html`<div><a href=${link("tasks", null, { device_id: id })}>${t("all_its_tasks")}</a> <${CurlButton} path=${path} /></div>`;
  return html`<${Section} title=${t("its_newest_tasks")} aside=${aside}><${Refusal} problem=${problem} />
    ${data?.tasks.length === 0 && html`<${Card}><${Empty}><p>${t("device_no_tasks")}</p></${Empty}></${Card}>`}
    ${data?.tasks.length > 0 && html`<${Table} label=${t("its_newest_tasks")} rows=${data.tasks} keyOf=${(task) => task.id} columns=${[
      { name: "state", label: t("state"), cell: (task) => html`<${Pill} name=${task.status} />` },
      { name: "task", label: t("task"), cell: (task) => html`<span><${TaskLink} id=${task.id} /><span class="small">${task.task_type}</span></span>` },
      { name: "what", label: t("about_task"), cell: (task) => html`<span>${[task.username, task.app_id, task.batch].filter(Boolean).join(" · ")}<span class="small">${[ended(task), task.error_message].filter(Boolean).join(": ")}</span></span>` },
      { name: "at", label: t("created"), cell: (task) => html`<${Moment} at=${task.created_at} />` }]} />`}</${Section}>`;
}
function Failures({ failures }) {
  return html`<${Section} title=${t("recent_failures")}>${failures.length === 0 ? html`<${Card}><${Empty}><p>${t("no_failures")}</p></${Empty}></${Card}>` : html`<${Table} label=${t("recent_failures")} rows=${failures.slice(0, SHOWN)} keyOf=${(attempt) => attempt.id} columns=${[
    { name: "at", label: t("time"), cell: (attempt) => html`<${Moment} at=${attempt.completed_at} />` },
    { name: "task", label: t("task"), cell: (attempt) => html`<${TaskLink} id=${attempt.task_id} />` },
    { name: "error", label: t("error"), cell: (attempt) => html`<span class="red-text">${[attempt.error_type && (has(`reason_${attempt.error_type}`) ? t(`reason_${attempt.error_type}`) : attempt.error_type), attempt.error_message].filter(Boolean).join(": ") || t(attempt.status)}</span>` },
    { name: "took", label: t("duration"), cell: (attempt) => (attempt.duration_seconds === null ? "–" : duration(attempt.duration_seconds, true)) }]} />`}</${Section}>`;
}
function History({ id }) {
  const path = `/events/history${query({ device_id: id, limit: SHOWN })}`;
  const { data, problem } = useLive(path);
  const aside = html`<div><a href=${link("events", null, { device_id: id })}>${t("nav_events")}</a> <${CurlButton} path=${path} /></div>`;
  return html`<${Section} title=${t("its_events")} aside=${aside}><${Refusal} problem=${problem} />
    ${data?.events.length === 0 && html`<${Card}><${Empty}><p>${t("device_no_events")}</p></${Empty}></${Card}>`}
    ${data?.events.length > 0 && html`<${EventTable} events=${data.events} />`}</${Section}>`;
}
function Beats({ path, beats }) {
  const [isWhole, show] = useState(false);
  const newest = [...beats].sort((a, b) => (a.heartbeat_at < b.heartbeat_at ? 1 : -1));
  const figure = (name) => ({ name, label: t(name), cell: (beat) => (typeof beat[`${name}_usage`] === "number" ? `${number(beat[`${name}_usage`], 1)}%` : "–") });
  return html`<${Section} title=${t("heartbeats")} aside=${html`<div><${CurlButton} path=${`${path}/stats`} /></div>`}>
    ${newest.length === 0 ? html`<${Card}><${Empty}><p>${t("no_beats")}</p></${Empty}></${Card}>` : html`<${Table} label=${t("heartbeats")} rows=${isWhole ? newest : newest.slice(0, SHOWN)} keyOf=${(beat) => beat.heartbeat_at} columns=${[
      { name: "at", label: t("time"), cell: (beat) => html`<${Moment} at=${beat.heartbeat_at} />` }, figure("cpu"), figure("memory"), figure("disk"),
      { name: "active", label: t("running"), cell: (beat) => number(beat.active_tasks) }]} />`}
    ${!isWhole && newest.length > SHOWN && html`<p><button type="button" class="plain" onClick=${() => show(true)}>${t("all_beats", { n: number(newest.length) })}</button></p>`}</${Section}>`;
}
