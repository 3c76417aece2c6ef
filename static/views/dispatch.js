/* Where do tasks go, what waits and why, and what does a person hold back? */
import { html, useRef, useState } from "../vendor/htm-preact.js";
import { query } from "../api.js";
import { useLive } from "../live.js";
import { act, BatchLink, Card, CurlButton, DeviceLink, Empty, goWith, link, OPEN, Pages, Pill, ReasonDialog, Refusal, Section, Table, Waiting } from "../parts.js";
import { may } from "../session.js";
import { has, number, sentence, t, why } from "../text.js";
import { keyWords, Limits, Until } from "./limits.js";
import { LANES_ASKED, WHY_MS } from "./task_table.js";

const LANES_SHOWN = 25;

export function Dispatch({ values }) {
  const { data: overview, problem } = useLive("/system/overview");
  const { data: limits, at, problem: limitsProblem } = useLive("/limits");
  if (!overview) return problem ? html`<${Refusal} problem=${problem} />` : html`<${Waiting} lines=${8} />`;
  const paused = overview.paused || [];
  return html`<div class="two"><${Strategy} /><${Pauses} paused=${paused} /></div>
    <${Limits} data=${limits} at=${at} problem=${limitsProblem} />
    <${Lanes} values=${values} limits=${limits?.limits || []} paused=${paused} />`;
}

// ---- The strategy ---------------------------------------------------------------------------------------------------
function switchTo(name, before) {
  return act("/strategy", { method: "PUT", body: { strategy: name }, done: t("strategy_switched", { name: strategyName(name) }), undo: () => switchTo(before, name) });
}
const strategyName = (name) => (has(`strategy_${name}`) ? t(`strategy_${name}`) : name);
function Strategy() {
  const { data, problem } = useLive("/strategy");
  return html`<${Section} title=${t("strategy")} aside=${html`<div><${CurlButton} path="/strategy" /></div>`}><${Refusal} problem=${problem} />
    ${data ? html`<ul class="card choices strategies">${data.available.map((name) => html`<li key=${name} data-strategy=${name}><button type="button" aria-pressed=${name === data.strategy} class=${name === data.strategy ? "main" : "plain"} disabled=${!may("operator")} title=${may("operator") ? null : t("needs_operator")}
      onClick=${() => name !== data.strategy && switchTo(name, data.strategy)}>${strategyName(name)}</button><small class="quiet">${t(has(`about_strategy_${name}`) ? `about_strategy_${name}` : "about_strategy_own")}</small></li>`)}</ul>` : !problem && html`<${Card}><${Waiting} lines=${4} /></${Card}>`}</${Section}>`;
}

// ---- Pauses ---------------------------------------------------------------------------------------------------------
const SCOPES = { all: () => "/system", type: (name) => `/task-types/${encodeURIComponent(name)}`, batch: (name) => `/batches/${encodeURIComponent(name)}`, lane: (name) => `/lanes/${name}` };
const pausedName = (scope, name) => t(`pause_${scope}`, { name });
function pause(scope, name, reason) {
  return act(`${SCOPES[scope](name)}/pause`, { body: reason ? { reason } : {}, done: t("now_paused", { what: pausedName(scope, name) }), undo: () => resume(scope, name, reason) });
}
function resume(scope, name, reason) {
  return act(`${SCOPES[scope](name)}/resume`, { done: t("now_resumed", { what: pausedName(scope, name) }), undo: () => pause(scope, name, reason) });
}
/** One button: holds it back with a reason, or lets it go on. */
function PauseButton({ scope, name = null, held, className = "plain" }) {
  const [isOpen, open] = useState(false);
  const words = t(held ? "resume" : "pause"), what = pausedName(scope, name);
  if (!may("operator")) return null;
  return html`<button type="button" class=${held ? "main" : className} aria-label=${`${words}: ${what}`} onClick=${() => (held ? resume(scope, name, held.reason) : open(true))}>${words}</button>
    ${isOpen && html`<${ReasonDialog} title=${t("pause_title", { what })} help=${t("pause_help")} button=${t("pause")} onReason=${(reason) => pause(scope, name, reason)} onClose=${() => open(false)} />`}`;
}
const heldIn = (paused, scope, name = null) => paused.find((one) => one.scope === scope && one.name === name);

function Pauses({ paused }) {
  const { data } = useLive("/tasks/stats", 10000);
  const counts = data?.by_type || {}, isOpen = (type) => OPEN.some((state) => counts[type][state]);
  const types = [...new Set([...Object.keys(counts).filter(isOpen), ...paused.filter((one) => one.scope === "type").map((one) => one.name)])].sort();
  const all = heldIn(paused, "all"), others = paused.filter((one) => one.scope === "batch");
  return html`<${Section} title=${t("pauses")} aside=${html`<div><${CurlButton} path="/tasks/stats" /></div>`}>
    <${Card}><div class=${`hold ${all ? "amber" : "green"}`} id="all-paused"><${Pill} name=${all ? "paused" : "open"}>${t(all ? "all_is_paused" : "all_goes_on")}</${Pill}><p>${all ? sentence(all.reason) : t("all_goes_on_help")}</p><${PauseButton} scope="all" held=${all} className="danger" /></div></${Card}>
    ${data && (types.length ? html`<${Table} label=${t("task_types")} rows=${types} keyOf=${(type) => type} columns=${[
      { name: "type", label: t("task_type"), cell: (type) => html`<span><a href=${link("tasks", null, { task_type: type })}>${type}</a>${heldIn(paused, "type", type) && html` <${Pill} name="paused" /><span class="small">${heldIn(paused, "type", type).reason}</span>`}</span>` },
      { name: "waits", label: t("waits"), cell: (type) => number((counts[type]?.pending || 0) + (counts[type]?.scheduled || 0)) },
      { name: "held", label: t("on_devices"), cell: (type) => number((counts[type]?.assigned || 0) + (counts[type]?.running || 0)) },
      may("operator") && { name: "do", label: t("actions"), cell: (type) => html`<${PauseButton} scope="type" name=${type} held=${heldIn(paused, "type", type)} />` }]} />` : html`<${Card}><${Empty}><p>${t("no_open_types")}</p></${Empty}></${Card}>`)}
    ${others.length > 0 && html`<${Table} label=${t("paused_batches")} rows=${others} keyOf=${(one) => one.name} columns=${[
      { name: "batch", label: t("batch"), cell: (one) => html`<span><${BatchLink} name=${one.name} /> <${Pill} name="paused" /><span class="small">${one.reason}</span></span>` },
      may("operator") && { name: "do", label: t("actions"), cell: (one) => html`<${PauseButton} scope="batch" name=${one.name} held=${one} />` }]} />`}</${Section}>`;
}

// ---- Lanes ----------------------------------------------------------------------------------------------------------
function Lanes({ values, limits, paused }) {
  const path = `/lanes${query({ task_type: values.task_type, limit: LANES_SHOWN, cursor: values.cursor })}`;
  const { data, problem } = useLive(path);
  const filter = html`<input type="search" aria-label=${t("task_type")} placeholder=${t("task_type")} value=${values.task_type || ""} onChange=${(event) => goWith({ task_type: event.target.value.trim(), cursor: "" })} />`;
  return html`<${Section} title=${t("lanes")} aside=${html`<div>${filter}<${CurlButton} path=${path} /></div>`}><p class="quiet">${t("lanes_help")}</p><${Refusal} problem=${problem} />
    ${data?.lanes.length === 0 && html`<${Card}><${Empty}><p>${t(values.task_type || values.cursor ? "no_lanes_here" : "no_lanes")}</p></${Empty}></${Card}>`}
    ${data?.lanes.length > 0 && html`<${Table} label=${t("lanes")} rows=${data.lanes} keyOf=${(lane) => lane.id} columns=${[
      { name: "lane", label: t("lane"), cell: (lane) => html`<span><a href=${link("tasks", null, { status: "pending", task_type: lane.task_type, batch: lane.batch })}>${lane.task_type}</a><span class="small">#${lane.id}</span></span>` },
      { name: "what", label: t("shares"), cell: (lane) => html`<${Shares} lane=${lane} />` },
      { name: "waits", label: t("waits"), cell: (lane) => number(lane.waiting) },
      { name: "priority", label: t("top_priority"), cell: (lane) => (lane.waiting ? number(lane.top_priority) : "–") },
      { name: "why", label: t("why"), cell: (lane) => html`<${Why} key=${lane.id} lane=${lane} limits=${limits} paused=${paused} isFirst=${data.lanes.indexOf(lane) < LANES_ASKED} />` },
      may("operator") && { name: "do", label: t("actions"), cell: (lane) => html`<${PauseButton} scope="lane" name=${String(lane.id)} held=${lane.paused ? { reason: lane.paused_reason } : null} />` }]} />`}
    ${!data && !problem && html`<${Card}><${Waiting} lines=${4} /></${Card}>`}
    <${Pages} next=${data?.next_cursor} cursor=${values.cursor} /></${Section}>`;
}
function Shares({ lane }) {
  const device = lane.pinned_device_id || lane.prefer_device_id;
  return html`<span>${lane.batch && html`<span class="share">${t("batch")}: <${BatchLink} name=${lane.batch} /></span>`}
    ${device && html`<span class="share">${t(lane.pinned_device_id ? "pinned" : "prefers")}: <${DeviceLink} id=${device} /></span>`}
    ${lane.same_device_as && html`<span class="share">${t("same_device_as")}: ${lane.same_device_as}</span>`}
    ${lane.required_tags.length > 0 && html`<span class="share">${t("tags")}: ${lane.required_tags.join(", ")}</span>`}
    ${lane.limit_keys.map((value) => html`<span class="share">${t("counted_as")}: ${keyWords(value)}</span>`)}</span>`;
}
/** The limits' keys that hold this lane. The API says of a lane only that it is closed, and that only after it was looked at
    for a device; GET /limits says by what, and at once. */
function holders(lane, limits) {
  const values = lane.limit_keys.map((value) => JSON.stringify(value));
  return limits.filter((limit) => isAbout(limit.task_type, lane.task_type))
    .flatMap((limit) => limit.keys.filter((key) => key.held_by && values.includes(JSON.stringify(key.value))).map((key) => ({ limit, key })));
}
/** * and ? as in file names, as the master takes them. */
const isAbout = (pattern, type) => new RegExp(`^${pattern.replace(/[.\\+^$()|{}[\]]/g, "\\$&").replace(/\*/g, ".*").replace(/\?/g, ".")}$`).test(type);
function Why({ lane, limits, paused, isFirst }) {
  if (!lane.waiting && !lane.paused) return "–";
  const batch = lane.batch && heldIn(paused, "batch", lane.batch), type = heldIn(paused, "type", lane.task_type), all = heldIn(paused, "all");
  const of = (words, reason) => html`<span><${Pill} name="paused">${words}</${Pill}>${reason && html`<span class="small">${reason}</span>`}</span>`;
  if (all) return of(t("all_is_paused"), all.reason);
  if (type) return of(pausedName("type", type.name), type.reason);
  if (lane.is_held) return of(pausedName("batch", lane.batch), batch?.reason);
  if (lane.paused) return of(t("paused"), lane.paused_reason);
  if (lane.is_stale) return html`<span>${t("lane_moves")}</span>`;
  const found = holders(lane, limits);
  if (found.length || lane.is_closed) {
    return html`<span>${found.length === 0 && html`<${Pill} name="full">${t("limit_holds")}</${Pill}>`}${found.map(({ limit, key }) => html`<span class="share" key=${`${limit.name} ${key.value}`}><${Pill} name=${key.held_by === "closed" ? "closed" : "full"}>${limit.name}</${Pill}>
      <span class="small">${t(`held_${key.held_by}`)} ${key.closed_reason || ""} ${key.closed_until && html`<${Until} at=${Date.parse(key.closed_until)} />`}</span></span>`)}</span>`;
  }
  return html`<${AskWhy} lane=${lane} isFirst=${isFirst} />`;
}
/** Nothing holds the lane itself: the task that goes next is asked, of the first lanes by itself, of others when somebody wants to know. */
function AskWhy({ lane, isFirst }) {
  const [isWanted, want] = useState(false);
  const isAsked = isFirst || isWanted, asked = useRef({ until: 0 });
  if (asked.current.until <= performance.now()) asked.current = { id: lane.next_task_id, until: performance.now() + WHY_MS };
  const { data: answer } = useLive(isAsked && asked.current.id ? `/tasks/${asked.current.id}/why` : null, WHY_MS);
  const known = useRef(null);  // another task goes next: it waits for the same reason until it says another
  if (answer?.status === "pending") known.current = answer;
  if (isAsked) return html`<span>${known.current ? why(known.current) : t("loading")}</span>`;
  return html`<span class="row"><span>${t("lane_open")}</span><button type="button" class="plain" aria-label=${`${t("ask_why")}: ${lane.task_type} #${lane.id}`} onClick=${() => want(true)}>${t("ask_why")}</button></span>`;
}
