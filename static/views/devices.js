/* Which devices are there, how is each of them, and which one needs a person? Made for one device and for a thousand. */
import { html, useRef, useState } from "../vendor/htm-preact.js";
import { query } from "../api.js";
import { useLive } from "../live.js";
import { Age, Card, CurlButton, DeviceLink, Empty, goWith, Icon, link, Pill, Refusal, Section, Table, tone, Waiting } from "../parts.js";
import { may } from "../session.js";
import { number, t } from "../text.js";
import { DeviceActions, devicePath, isAway, Load, nameOf, rateWords, STATUSES, statusOf, successRate, Troubles, troubles, Usage } from "./device_parts.js";
import { AddDevice } from "./first_steps.js";

const PAGE = 25, BEATS_MS = 60000;
const RANK = { conflict: 0, off: 2, disabled: 5, stopped: 6 };

export function Devices({ values }) {
  const [known, know] = useState(0);
  // A list of hundreds is a large answer: it is asked less often, and events do not hurry it.
  const { data, problem } = useLive("/devices", known > 300 ? 20000 : known > 100 ? 10000 : 5000);
  if (!data) return problem ? html`<${Refusal} problem=${problem} />` : html`<${Waiting} lines=${6} />`;
  const devices = data.devices;
  if (devices.length !== known) know(devices.length);
  const counts = {};
  for (const device of devices) counts[statusOf(device)] = (counts[statusOf(device)] || 0) + 1;
  return html`<${List} devices=${devices} counts=${counts} values=${values} />`;
}

function List({ devices, counts, values }) {
  const [isAdding, add] = useState(false);
  const status = values.status === "offline" ? "off" : values.status;
  const path = `/devices${query({ status: ["off", "stopped"].includes(status) ? "offline" : status, task_type: values.task_type, tag: values.tag })}`;
  const aside = html`<div>${devices.length > 0 && may("admin") && html`<button type="button" id="add-device" class=${isAdding ? "plain" : "main"} aria-expanded=${isAdding} onClick=${() => add(!isAdding)}>${t("add_device")}</button>`}
    <${CurlButton} path=${path} /></div>`;
  return html`<${Section} title=${t("devices")} aside=${aside}>
      ${(isAdding || devices.length === 0) && html`<${Adding} isFirst=${devices.length === 0} />`}
      ${devices.length > 0 && html`<${Tiles} counts=${counts} all=${devices.length} chosen=${status || "all"} />`}
    </${Section}>
    ${devices.length > 0 && html`<div class="part"><${Filters} devices=${devices} values=${values} status=${status} /><${Rows} devices=${devices} values=${values} status=${status} /></div>`}`;
}
function Adding({ isFirst }) {
  const { data } = useLive("/system/overview");
  return html`<${Card} className="pad">${data ? html`<${AddDevice} hasWorkerFile=${data.has_worker_file} isFirst=${isFirst} />` : html`<${Waiting} lines=${5} />`}</${Card}>`;
}
const Tiles = ({ counts, all, chosen }) => html`<nav class="card tiles" aria-label=${t("by_status")}>${["all", ...STATUSES].map((name) => {
  const n = name === "all" ? all : counts[name] || 0;
  return html`<a key=${name} class=${`tile ${name === "all" ? "every" : tone(name)} ${n ? "" : "zero"}`} href=${link("devices", null, name === "all" ? {} : { status: name })}
    aria-current=${name === chosen ? "true" : null} title=${t(name === "all" ? "about_all_devices" : `about_${name}`)} data-status=${name}><b>${number(n)}</b><span><${Icon} name=${name} />${t(name)}</span></a>`;
})}</nav>`;

function Filters({ devices, values, status }) {
  const set = (name, replace) => (event) => goWith({ [name]: event.target.value, page: "" }, { replace });
  const every = (name) => [...new Set(devices.flatMap((device) => device[name] || []))].sort();
  const Choice = ({ name, label, options, chosen, words }) => html`<select aria-label=${label} name=${name} value=${chosen || ""} onChange=${set(name)}>
    <option value="">${label}: ${t("all")}</option>${options.map((option) => html`<option key=${option} value=${option} selected=${option === chosen}>${words ? words(option) : option}</option>`)}</select>`;
  const isFiltered = status || values.task_type || values.tag || values.text;
  return html`<form class="filters" role="search" aria-label=${t("filter_devices")} onSubmit=${(event) => event.preventDefault()}>
    <input type="search" name="text" aria-label=${t("device_text")} placeholder=${t("device_text")} value=${values.text || ""} onInput=${set("text", true)} />
    ${Choice({ name: "status", label: t("status"), options: STATUSES, chosen: status, words: t })}
    ${Choice({ name: "task_type", label: t("task_type"), options: every("task_types"), chosen: values.task_type })}
    ${Choice({ name: "tag", label: t("tag"), options: every("tags"), chosen: values.tag })}
    ${isFiltered && html`<button type="button" class="plain" onClick=${() => goWith({ text: "", status: "", task_type: "", tag: "", page: "" })}>${t("clear")}</button>`}</form>`;
}
function isWanted(device, values, status) {
  const text = (values.text || "").trim().toLowerCase();
  const written = [device.device_id, device.device_name, device.device_type, device.ip_address, device.version, device.wanted_reason, ...(device.tags || []), ...(device.task_types || [])];
  return (!status || statusOf(device) === status) && (!values.task_type || device.task_types?.includes(values.task_type)) && (!values.tag || device.tags?.includes(values.tag))
    && (!text || written.some((one) => one && String(one).toLowerCase().includes(text)));
}
/** What a person should see first; whether slots are taken moves nobody. */
const rank = (device) => RANK[statusOf(device)] ?? (troubles(device).length ? 1 : 3);

/** In order, but while the pointer or the focus is among the rows, every row stays where it was. */
function useCalmOrder(sorted, mark) {
  const before = useRef({ mark: "", places: new Map() }), isHeld = useRef(false);
  let rows = sorted;
  if (isHeld.current && before.current.mark === mark) {
    const place = (device) => before.current.places.get(device.device_id) ?? Infinity;
    rows = [...sorted].sort((a, b) => (place(a) === place(b) ? 0 : place(a) - place(b)));
  }
  before.current = { mark, places: new Map(rows.map((device, i) => [device.device_id, i])) };
  const hold = (held) => () => { isHeld.current = held; };
  return [rows, { onPointerEnter: hold(true), onPointerLeave: hold(false), onFocusIn: hold(true), onFocusOut: hold(false) }];
}

function Rows({ devices, values, status }) {
  const sorted = devices.filter((device) => isWanted(device, values, status)).map((device) => [rank(device), device])
    .sort(([a, one], [b, other]) => a - b || (one.device_id < other.device_id ? -1 : 1)).map(([, device]) => device);
  const [rows, calm] = useCalmOrder(sorted, JSON.stringify(values));
  if (!rows.length) return html`<${Card}><${Empty}><p>${t("no_device_matches")}</p></${Empty}></${Card}>`;
  const pages = Math.ceil(rows.length / PAGE), page = Math.min(pages, Math.max(1, Math.floor(Number(values.page)) || 1)), from = (page - 1) * PAGE;
  return html`<div ...${calm}><${Table} label=${t("devices")} columns=${columns()} rows=${rows.slice(from, from + PAGE)} keyOf=${(device) => device.device_id} /></div>
    ${pages > 1 && html`<nav class="pages" aria-label=${t("pages")}>
      <button type="button" class="plain" disabled=${page === 1} onClick=${() => goWith({ page: page === 2 ? "" : page - 1 })}>${t("page_before")}</button>
      <span class="quiet">${t("page_of", { from: number(from + 1), to: number(Math.min(rows.length, from + PAGE)), n: number(rows.length) })}</span>
      <button type="button" class="plain" disabled=${page === pages} onClick=${() => goWith({ page: page + 1 })}>${t("next_page")}</button></nav>`}`;
}
const columns = () => [
  { name: "device", label: t("device"), cell: (device) => html`<span class="who"><${DeviceLink} id=${device.device_id} name=${nameOf(device)} />
    <span class="small">${nameOf(device) === device.device_id ? "" : `${device.device_id} · `}${device.version || ""}</span><${Troubles} device=${device} /></span>` },
  { name: "status", label: t("status"), cell: (device) => html`<span><${Pill} name=${statusOf(device)} />${device.wanted_reason && html`<span class="small">${device.wanted_reason}</span>`}</span>` },
  { name: "load", label: t("load"), cell: (device) => html`<${Load} device=${device} />` },
  ...["cpu", "memory", "disk"].map((name) => ({ name, label: t(name), cell: (device) => html`<${LiveUsage} device=${device} name=${name} />` })),
  { name: "last", label: t("last_beat"), cell: (device) => html`<${Age} at=${device.last_heartbeat_at} />` },
  { name: "finished", label: t("last_finished"), cell: (device) => html`<${Age} at=${device.last_finished_at} />` },
  { name: "ended", label: t("success"), cell: (device) => html`<span>${rateWords(successRate(device))}<span class="small" title=${t("done_failed_lost")}>${[device.completed_count, device.failed_count, device.lost_count].map((n) => number(n)).join(" / ")}</span></span>` },
  { name: "runs", label: t("runs"), cell: (device) => html`<span><span class="runs">${(device.task_types || []).join(", ")}</span><span class="small">${(device.tags || []).join(", ")}</span></span>` },
  may("operator") && { name: "do", label: t("actions"), cell: (device) => html`<${DeviceActions} device=${device} />` },
];
/** The curves of the devices on this page only, once a minute; the figure beside one is as new as the row. */
function LiveUsage({ device, name }) {
  const { data } = useLive(isAway(device) ? null : devicePath(device.device_id), BEATS_MS);
  return html`<${Usage} device=${device} name=${name} beats=${data?.beats} />`;
}
