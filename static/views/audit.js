/* Who did what, from where, and how did it end? Refusals are red. */
import { html } from "../vendor/htm-preact.js";
import { query } from "../api.js";
import { useLive } from "../live.js";
import { Card, CurlButton, Empty, Field, goWith, Icon, link, Moment, Pages, Refusal, Table, Waiting } from "../parts.js";
import { has, number, t } from "../text.js";

const OK = "ok";
const ACTIONS = {  // name: the view that shows what it was done to
  refused: "", login: "", create_key: "", revoke_key: "", revoke_device: "devices", set_device_status: "devices", rename_device: "devices", delete_device: "devices",
  act_on_tasks: "", cancel_task: "tasks", requeue_task: "tasks", assign_task: "tasks", pause_batch: "batches", resume_batch: "batches", cancel_batch: "batches", set_limits: "", open_limit: "",
  pause_lane: "", resume_lane: "", pause_type: "", resume_type: "", pause_all: "", resume_all: "", set_strategy: "", make_backup: "",
};
const OUTCOMES = [OK, "unauthorized", "forbidden", "key_revoked", "key_expired", "too_many_failures", "too_many_requests", "not_your_device", "address_not_allowed", "key_in_url", "foreign_origin"];

const words = (key, name) => (has(key) ? t(key) : name.replace(/_/g, " "));  // a newer master knows more
const actionWords = (name) => words(`action_${name}`, name), outcomeWords = (name) => words(`outcome_${name}`, name);

export function Audit({ values }) {
  const path = `/audit${query({ actor: values.actor, action: values.action, outcome: values.outcome, cursor: values.cursor })}`;
  const { data, problem } = useLive(path);
  const isFiltered = values.actor || values.action || values.outcome;
  return html`<div class="head"><${Filters} values=${values} isFiltered=${isFiltered} /><div><${CurlButton} path=${path} /></div></div><${Refusal} problem=${problem} />
    ${!data ? !problem && html`<${Waiting} lines=${8} />` : data.entries.length === 0 ? html`<${Card}><${Empty}><p>${t(isFiltered || values.cursor ? "no_audit_matches" : "no_audit")}</p></${Empty}></${Card}>` : html`<${Table} label=${t("audit")} rows=${data.entries} keyOf=${(entry) => entry.id} columns=${COLUMNS()} />`}
    <${Pages} next=${data?.next_cursor} cursor=${values.cursor} />`;
}
function Filters({ values, isFiltered }) {
  const set = (name) => (event) => goWith({ [name]: event.target.value.trim(), cursor: "" });
  const Choice = (name, label, known, wordsOf) => html`<${Field} label=${label}><select name=${name} value=${values[name] || ""} onChange=${set(name)}><option value="">${t("all")}</option>
    ${[...new Set([...known, values[name]])].filter(Boolean).map((one) => html`<option key=${one} value=${one} selected=${one === values[name]}>${wordsOf(one)}</option>`)}</select></${Field}>`;
  return html`<form class="filters" role="search" aria-label=${t("filter_audit")} onSubmit=${(event) => event.preventDefault()}>
    <${Field} label=${t("actor")}><input name="actor" value=${values.actor || ""} maxLength="128" autocomplete="off" spellcheck=${false} placeholder=${t("actor_hint")} onChange=${set("actor")} /></${Field}>
    ${Choice("action", t("action"), Object.keys(ACTIONS), actionWords)}${Choice("outcome", t("outcome"), OUTCOMES, outcomeWords)}
    ${isFiltered && html`<button type="button" class="plain" onClick=${() => goWith({ actor: "", action: "", outcome: "", cursor: "" })}>${t("clear")}</button>`}</form>`;
}
const COLUMNS = () => [
  { name: "at", label: t("time"), cell: (entry) => html`<${Moment} at=${entry.at} />` },
  { name: "outcome", label: t("outcome"), cell: ({ outcome }) => html`<span class=${`pill ${outcome === OK ? "gray" : "red"}`} title=${outcome}><${Icon} name=${outcome === OK ? "completed" : "failed"} />${outcomeWords(outcome)}</span>` },
  { name: "actor", label: t("actor"), cell: (entry) => html`<span><a href=${link("access", null, { show: "audit", actor: entry.actor })}>${entry.actor}</a><span class="small">${[entry.role && t(`role_${entry.role}`), entry.address !== entry.actor && entry.address].filter(Boolean).join(" · ")}</span></span>` },
  { name: "action", label: t("action"), cell: (entry) => html`<b>${actionWords(entry.action)}</b>` },
  { name: "object", label: t("audit_object"), cell: ({ action, object }) => object && (ACTIONS[action] ? html`<a href=${link(ACTIONS[action], object)}>${object}</a>` : object) },
  { name: "more", label: t("event_facts"), cell: ({ detail }) => more(detail) },
];
/** A refusal stands for all of its kind in that minute. */
function more({ count, first, ...others }) {
  const facts = Object.entries(others).map(([name, value]) => `${name}: ${typeof value === "object" ? JSON.stringify(value) : value}`);
  return [first && t("refused_times", { n: number(count), first }), ...facts].filter(Boolean).join(" · ");
}
