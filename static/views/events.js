/* What happened? The kept events, newest first, and what comes in while one looks. */
import { html } from "../vendor/htm-preact.js";
import { query } from "../api.js";
import { useLive } from "../live.js";
import { BatchLink, CurlButton, DeviceLink, Empty, Field, goWith, Moment, Pages, Refusal, Section, Table, TaskLink, Waiting } from "../parts.js";
import { has, number, t } from "../text.js";

const KINDS = ["device", "task", "batch", "system", "access"];
const BAD = ["release", "timeout", "poison", "device_offline", "device_conflict", "limit_closed", "login_failed", "device_revoked", "backup_failed", "deletion_waits"], GOOD = ["device_registered", "device_online", "batch_open", "resumed", "lane_resumed", "limit_opened", "backup"];
const OTHERS = ["device_stopped", "device_wanted", "device_renamed", "device_removed", "batch_paused", "batch_cancelled", "paused", "lane_paused", "limits", "strategy", "bulk_cancel", "bulk_requeue", "clock_moved", "master_started", "master_stopped", "restored", "login"];
const SHOWN_APART = ["verb", "task", "device", "device_id", "batch", "count", "first_task", "last_task"];

export function Events({ values }) {
  const path = `/events/history${query({ ...values, limit: 50 })}`;
  const { data, problem } = useLive(path);
  return html`<${Section} title=${t("nav_events")} aside=${html`<div><${CurlButton} path=${path} /></div>`}>
    <${Filters} values=${values} /><${Refusal} problem=${problem} />
    ${data && data.events.length > 0 && html`<${EventTable} events=${data.events} />`}
    ${data && data.events.length === 0 && html`<div class="card"><${Empty}><p>${t("no_events")}</p></${Empty}></div>`}
    ${!data && !problem && html`<${Waiting} />`}
    <${Pages} next=${data?.next_cursor} cursor=${values.cursor} /></${Section}>`;
}
function Filters({ values }) {
  const set = (name) => (event) => goWith({ [name]: event.target.value.trim(), cursor: "" });
  return html`<form class="filters" onSubmit=${(event) => event.preventDefault()}>
    <${Field} label=${t("event_kind")}><select value=${values.kind || ""} onChange=${set("kind")}><option value="">${t("all")}</option>
      ${KINDS.map((kind) => html`<option key=${kind} value=${kind}>${t(`kind_${kind}`)}</option>`)}</select></${Field}>
    <${Field} label=${t("device")}><input value=${values.device_id || ""} onChange=${set("device_id")} /></${Field}>
    <${Field} label=${t("event_verb")}><select value=${values.verb || ""} onChange=${set("verb")}><option value="">${t("all")}</option>
      ${[...BAD, ...GOOD, ...OTHERS].map((verb) => html`<option key=${verb} value=${verb}>${words(verb)}</option>`)}</select></${Field}></form>`;
}
/** Also part of a device's own view. */
export const EventTable = ({ events }) => html`<${Table} label=${t("nav_events")} rows=${events} keyOf=${(event) => event.id} columns=${[
  { name: "at", label: t("time"), cell: (event) => html`<${Moment} at=${event.at} />` },
  { name: "event", label: t("event_verb"), cell: (event) => html`<span class=${`pill ${BAD.includes(event.verb) ? "red" : GOOD.includes(event.verb) ? "green" : "gray"}`}>${words(event.verb)}</span>` },
  { name: "which", label: t("event_about"), cell: ({ facts }) => html`<${About} facts=${facts} />` },
  { name: "more", label: t("event_facts"), cell: ({ facts }) => rest(facts) },
]} />`;
const words = (verb) => (has(`event_${verb}`) ? t(`event_${verb}`) : verb.replace(/_/g, " "));  // a newer master knows more
function About({ facts }) {
  const device = facts.device ?? facts.device_id;
  return html`${device && html`<${DeviceLink} id=${device} /> `}${facts.batch && html`<${BatchLink} name=${facts.batch} /> `}${facts.task && html`<${TaskLink} id=${facts.task} /> `}
    ${facts.count !== undefined && html`<span>${t("event_count", { n: number(facts.count) })}</span> `}${facts.first_task && html`<${TaskLink} id=${facts.first_task} />`}${facts.last_task && facts.last_task !== facts.first_task && html` – <${TaskLink} id=${facts.last_task} />`}`;
}
const rest = (facts) => Object.entries(facts).filter(([name, value]) => !SHOWN_APART.includes(name) && value !== null && value !== "")
  .map(([name, value]) => `${name}: ${typeof value === "object" ? JSON.stringify(value) : value}`).join(" · ");
