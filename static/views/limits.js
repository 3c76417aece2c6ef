/* How full is every limit, when does it open again, and how is it changed? Part of the dispatch view. */
import { html, useState } from "../vendor/htm-preact.js";
import { curl, now } from "../api.js";
import { act, Card, Command, CurlButton, Dialog, Empty, Field, Meter, Pill, Refusal, Section, SureButton, Table, useTick, Waiting } from "../parts.js";
import { may } from "../session.js";
import { clock, duration, number, t, utc } from "../text.js";

const KEYS_SHOWN = 10;
const NUMBERS = ["max_running", "max_starts", "window_seconds", "max_starts_per_day"];
const EXAMPLE = [{ name: "site", task_type: "crawl", key: "task_data.host", max_running: 4, max_starts: 60, window_seconds: 60 }];

export const keyWords = (value) => (value.length ? value.join(" · ") : t("all_together"));
/** When something opens by itself, counting down. */
export function Until({ at }) {
  useTick();
  const iso = new Date(at).toISOString();
  return html`<time dateTime=${iso} title=${utc(iso)}>${t("opens", { time: clock(iso), age: duration((at - now()) / 1000) })}</time>`;
}
/** A limit as PUT /limits takes it: without its counts, and without the numbers that it does not have. */
const bare = (limit) => Object.fromEntries(Object.entries({ name: limit.name, task_type: limit.task_type, key: limit.key.length > 1 ? limit.key : limit.key[0], ...Object.fromEntries(NUMBERS.map((name) => [name, limit[name]])) })
  .filter(([, value]) => value !== null && value !== undefined));
const put = (wanted, before, { done = t("limits_set"), refused = null } = {}) => act("/limits", { method: "PUT", body: { limits: wanted }, done, refused, undo: () => put(before, wanted, { done: t("limits_back") }) });

export function Limits({ data, at, problem }) {
  const [edited, edit] = useState(null);  // {n} of the list, its length for a new one, {isJson}
  const limits = data?.limits || [], before = limits.map(bare);
  const aside = html`<div>${data && may("operator") && html`<button type="button" class="plain" onClick=${() => edit({ n: limits.length })}>${t("add_limit")}</button><button type="button" class="plain" onClick=${() => edit({ isJson: true })}>${t("edit_json")}</button>`}<${CurlButton} path="/limits" /></div>`;
  return html`<${Section} title=${t("limits")} aside=${aside}><${Refusal} problem=${problem} />
    ${!data && !problem && html`<${Card}><${Waiting} lines=${4} /></${Card}>`}
    ${data?.moving > 0 && html`<p class="note amber">${t("limits_moving", { n: number(data.moving) })}</p>`}
    ${data && limits.length === 0 && html`<${Card}><${Empty}><p>${t("no_limits")}</p>${may("operator") && html`<${Command} text=${curl("/limits", { method: "PUT", body: { limits: EXAMPLE } })} />`}<p>${t("no_limits_config")}</p><pre tabindex="0">${JSON.stringify({ limits: EXAMPLE }, null, 2)}</pre></${Empty}></${Card}>`}
    <div class="limits">${limits.map((limit, n) => html`<${Limit} key=${limit.name} limit=${limit} at=${at} onEdit=${() => edit({ n })} onRemove=${() => put(before.filter((_, i) => i !== n), before, { done: t("limit_removed", { name: limit.name }) })} />`)}</div>
    ${edited && (edited.isJson ? html`<${JsonDialog} before=${before} onClose=${() => edit(null)} />` : html`<${LimitDialog} before=${before} n=${edited.n} onClose=${() => edit(null)} />`)}</${Section}>`;
}

function Limit({ limit, at, onEdit, onRemove }) {
  const [isWhole, show] = useState(false);
  const closed = limit.keys.filter((key) => key.held_by === "closed").length;
  const about = [limit.max_running && t("at_once", { n: number(limit.max_running) }), limit.max_starts && t("starts_in", { n: number(limit.max_starts), age: duration(limit.window_seconds, true) }), limit.max_starts_per_day && t("starts_a_day", { n: number(limit.max_starts_per_day) })].filter(Boolean);
  const keys = isWhole ? limit.keys : limit.keys.slice(0, KEYS_SHOWN);
  return html`<div class="card limit" data-limit=${limit.name}><div class="head"><h3>${limit.name}</h3><div>
      ${may("operator") && html`${closed > 1 && html`<button type="button" class="plain" onClick=${() => openAgain(limit.name)}>${t("open_all", { n: number(closed) })}</button>`}
      <button type="button" class="plain" aria-label=${`${t("edit")}: ${limit.name}`} onClick=${onEdit}>${t("edit")}</button><${SureButton} sure=${t("remove_limit_sure")} onSure=${onRemove}>${t("remove_limit")}</${SureButton}>`}</div></div>
    <p class="quiet">${t("limit_types", { types: limit.task_type === "*" ? t("all_types") : limit.task_type })} · ${limit.key.length ? t("for_each", { key: limit.key.join(" + ") }) : t("all_together")} · ${about.join(" · ") || t("only_turns")}</p>
    ${limit.keys.length === 0 ? html`<p class="quiet">${t("limit_idle")}</p>` : html`<${Table} label=${limit.name} rows=${keys} keyOf=${(key) => JSON.stringify(key.value)} columns=${[
      { name: "value", label: limit.key.join(" + ") || t("all_together"), cell: (key) => html`<b>${keyWords(key.value)}</b>` },
      { name: "held", label: t("state"), cell: (key) => html`<${Held} limit=${limit} limitKey=${key} at=${at} />` },
      { name: "runs", label: t("running"), cell: (key) => html`<${Gauge} n=${key.running} most=${limit.max_running} label=${t("running")} />` },
      limit.max_starts && { name: "starts", label: t("starts_now"), cell: (key) => html`<${Gauge} n=${key.starts_in_window} most=${limit.max_starts} label=${t("starts_now")} />` },
      limit.max_starts_per_day && { name: "today", label: t("starts_today"), cell: (key) => html`<${Gauge} n=${key.starts_today} most=${limit.max_starts_per_day} label=${t("starts_today")} />` },
      may("operator") && limit.keys.some((key) => key.held_by === "closed") && { name: "do", label: t("actions"), cell: (key) => key.held_by === "closed" && html`<button type="button" class="plain" aria-label=${`${t("open_now")}: ${keyWords(key.value)}`} onClick=${() => openAgain(limit.name, key.value)}>${t("open_now")}</button>` }]} />`}
    ${!isWhole && limit.keys.length > KEYS_SHOWN && html`<p><button type="button" class="plain" onClick=${() => show(true)}>${t("all_keys", { n: number(limit.keys.length) })}</button></p>`}</div>`;
}
const Gauge = ({ n, most, label }) => (most ? html`<${Meter} part=${n / most} label=${label} words=${t("of", { n: number(n), limit: number(most) })} level=${n >= most ? "amber" : ""} />` : html`<span>${number(n)}</span>`);
function Held({ limit, limitKey: key, at }) {
  if (!key.held_by) return html`<${Pill} name="open">${t("has_room")}</${Pill}>`;
  const opensAt = key.closed_until ? Date.parse(key.closed_until) : key.next_look_seconds === null ? null : at + key.next_look_seconds * 1000;
  return html`<span><${Pill} name=${key.held_by === "closed" ? "closed" : "full"}>${t(`held_${key.held_by}`)}</${Pill}>
    <span class="small">${key.closed_reason && html`<span class="reason">${key.closed_reason} </span>`}${opensAt ? html`<${Until} at=${opensAt} />` : t(limit.max_running && key.held_by === "max_running" ? "opens_when_ends" : "")}</span></span>`;
}
const openAgain = (name, value) => act(`/limits/${encodeURIComponent(name)}/open`, { body: value ? { value } : {}, done: (answer) => t("now_open", { name, n: number(answer.opened) }) });

// ---- Changing -------------------------------------------------------------------------------------------------------
function useSaving(before, onClose) {
  const [problem, set] = useState(null);
  const save = async (wanted) => { set(null); if (await put(wanted, before, { refused: set })) onClose(); };
  return [problem, save, set];
}
function LimitDialog({ before, n, onClose }) {
  const old = before[n] || {};
  const [form, set] = useState({ ...old, key: [old.key || []].flat().join(", ") });
  const [problem, save] = useSaving(before, onClose);
  const send = (event) => {
    event.preventDefault();
    const key = form.key.split(",").map((field) => field.trim()).filter(Boolean);
    const limit = { name: form.name?.trim() || "", task_type: form.task_type?.trim() || "*" };
    if (key.length) limit.key = key.length > 1 ? key : key[0];
    for (const name of NUMBERS) if (form[name] !== undefined && form[name] !== "") limit[name] = Number(form[name]);
    save([...before.slice(0, n), limit, ...before.slice(n + 1)]);
  };
  const where = `limits[${n}].`, isHere = (name) => problem?.field?.startsWith(where + name);
  const input = (name, options = {}) => html`<${Field} label=${t(`limit_${name}`)} help=${t(`limit_${name}_help`)} problem=${isHere(name) && problem.message}><input name=${name} value=${form[name] ?? ""} onInput=${(event) => set({ ...form, [name]: event.target.value })} ...${options} /></${Field}>`;
  const figure = { type: "number", min: "1", step: "any" };
  return html`<${Dialog} title=${old.name ? t("edit_limit", { name: old.name }) : t("add_limit")} onClose=${onClose}><form onSubmit=${send}>
    <div class="fields">${input("name", { required: true, maxLength: "64" })}${input("task_type", { placeholder: "*" })}${input("key", { placeholder: "username" })}${NUMBERS.map((name) => html`<div key=${name}>${input(name, figure)}</div>`)}</div>
    ${problem && ![...NUMBERS, "name", "task_type", "key"].some(isHere) && html`<p class="note red" role="alert">${problem.message}</p>`}
    <div class="row"><button type="submit" class="main">${t("save")}</button></div></form></${Dialog}>`;
}
function JsonDialog({ before, onClose }) {
  const [text, set] = useState(JSON.stringify(before, null, 2));
  const [problem, save, tell] = useSaving(before, onClose);
  const send = (event) => {
    event.preventDefault();
    try {
      const read = JSON.parse(text);
      save(Array.isArray(read) ? read : read.limits);
    } catch (error) {
      tell({ message: t("form_json", { reason: error.message }) });
    }
  };
  return html`<${Dialog} title=${t("edit_json")} onClose=${onClose}><form onSubmit=${send}>
    <${Field} label=${t("limits_json")} help=${t("limits_json_help")} problem=${problem?.message}><textarea name="limits" rows="14" spellcheck=${false} value=${text} onInput=${(event) => set(event.target.value)} /></${Field}>
    <div class="row"><button type="submit" class="main">${t("save")}</button></div></form></${Dialog}>`;
}
