/* What is every view made of? Small pieces that look the same everywhere. Text from outside enters as text, never as HTML. */
import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { ask, curl, now, query } from "./api.js";
import { connection, soon } from "./live.js";
import { clock, duration, has, number, t, utc } from "./text.js";

export const STATES = ["scheduled", "pending", "assigned", "running", "completed", "failed", "cancelled"];
export const HELD = ["assigned", "running"], OPEN = ["scheduled", "pending", ...HELD];
const TONE = {
  scheduled: "violet", pending: "amber", assigned: "blue", running: "cyan", completed: "green", failed: "red", cancelled: "gray",
  snoozed: "violet", timeout: "red", released: "amber",
  online: "green", busy: "cyan", off: "red", offline: "red", stopped: "gray", draining: "amber", disabled: "gray", conflict: "red",
  open: "green", paused: "amber", closed: "red", full: "amber",
};
const PATHS = {
  all: "M3 4.5h10M3 8h10M3 11.5h10", scheduled: "M8 2.2a5.8 5.8 0 1 0 0 11.6A5.8 5.8 0 0 0 8 2.2M8 5v3.2l2 1.3", pending: "M3.5 8h.01M8 8h.01M12.5 8h.01",
  assigned: "M2.5 8h10M9 4.5 12.5 8 9 11.5", running: "M5 3.2v9.6L12.5 8z", completed: "M3 8.5 6.5 12 13 4.5", failed: "M4 4l8 8M12 4l-8 8", cancelled: "M3.5 8h9",
  released: "M13.5 8h-10M7 4.5 3.5 8 7 11.5", draining: "M8 2.5v10M4.5 9 8 12.5 11.5 9", conflict: "M8 3v6M8 12.5h.01", paused: "M5.5 3.5v9M10.5 3.5v9",
};
const ALIAS = {
  snoozed: "scheduled", timeout: "scheduled", online: "completed", open: "completed", busy: "running", off: "failed", offline: "failed", closed: "failed",
  stopped: "cancelled", disabled: "cancelled", ended: "cancelled", full: "conflict",
};

export const tone = (name) => TONE[name] || "gray";
export const Icon = ({ name }) => html`<svg class="icon" viewBox="0 0 16 16" aria-hidden="true"><path d=${PATHS[ALIAS[name] || name] || "M8 8h.01"} /></svg>`;
/** A state with its colour, icon and word. */
export const Pill = ({ name, children }) => html`<span class=${`pill ${tone(name)}`} title=${has(`about_${name}`) ? t(`about_${name}`) : null}><${Icon} name=${name} />${children || t(name)}</span>`;

// ---- Times that count on --------------------------------------------------------------------------------------------
const tickers = new Set();
setInterval(() => { if (!document.hidden) for (const tell of tickers) tell(); }, 1000);
export function useTick() {
  const [, redraw] = useState(0);
  useEffect(() => {
    const tell = () => redraw((n) => n + 1);
    tickers.add(tell);
    return () => tickers.delete(tell);
  }, []);
}
/** The viewer's time, with UTC on hover. */
export const Moment = ({ at }) => (at ? html`<time dateTime=${at} title=${utc(at)}>${clock(at)}</time>` : "–");
/** An age that counts on by itself; `key` is a sentence with {age}. While the master is lost it stands still: nobody knows. */
export function Age({ at, words = "ago" }) {
  useTick();
  if (at === null || at === undefined) return html`<span>${t("never")}</span>`;
  const iso = typeof at === "number" ? new Date(at).toISOString() : at;
  const until = connection.lostAt ?? now();
  return html`<time dateTime=${iso} title=${`${clock(iso)} · ${utc(iso)}`}>${t(words, { age: duration((until - Date.parse(iso)) / 1000) })}</time>`;
}

// ---- Frames ---------------------------------------------------------------------------------------------------------
let heads = 0;
/** A part of a view with its heading, and buttons at its right. */
export function Section({ title, aside, children, className = "" }) {
  const [id] = useState(() => `head-${(heads += 1)}`);
  return html`<section class=${`part ${className}`} aria-labelledby=${id}>
    <div class="head"><h2 id=${id}>${title}</h2>${aside}</div>${children}</section>`;
}
export const Card = ({ children, className = "" }) => html`<div class=${`card ${className}`}>${children}</div>`;
export const Empty = ({ children }) => html`<div class="empty">${children}</div>`;
/** What a question that was refused says; nothing when all is well. */
export const Refusal = ({ problem }) => (problem ? html`<p class="note red" role="alert">${problem.message}</p>` : null);
/** In place of what this role may not see or do. */
export const NotFor = ({ role }) => html`<${Card}><${Empty}><p>${t("not_for", { role: t(`role_${role}`) })}</p></${Empty}></${Card}>`;
/** Grey bars until the first answer is there: the page does not jump. */
export const Waiting = ({ lines = 3 }) => html`<div class="waiting" aria-busy="true"><span class="unseen">${t("loading")}</span>${Array.from({ length: lines }, () => html`<i />`)}</div>`;

/** columns: [{name, label, cell(row), title?, wide?}]; `name` is also the class of the cell. Below 40rem a row is a card. */
export function Table({ columns, rows, keyOf, label, chosen }) {
  const shown = columns.filter(Boolean);
  return html`<div class="scroll" tabindex=${0} role="group" aria-label=${label}><table>
    <thead><tr>${shown.map((column) => html`<th key=${column.name} scope="col" class=${column.name}>${column.head ? column.head() : column.label}</th>`)}</tr></thead>
    <tbody>${rows.map((row) => html`<tr key=${keyOf(row)} data-row=${keyOf(row)} class=${chosen?.(row) ? "chosen" : ""}>
      ${shown.map((column) => html`<td key=${column.name} class=${column.name} data-label=${column.label}>${column.cell(row)}</td>`)}</tr>`)}</tbody>
  </table></div>`;
}
/** Facts as a list of names and values; what has no value is left out. facts: [[name, value], ...] */
export const Facts = ({ facts }) => html`<dl class="facts">${facts.filter(([, value]) => value !== "" && value !== null && value !== undefined && value !== false)
  .map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
export const Json = ({ value, limit = 20000 }) => {
  const text = JSON.stringify(value, null, 2);
  return html`<pre tabindex="0">${text.length > limit ? `${text.slice(0, limit)}\n${t("cut")}` : text}</pre>`;
};
/** A bar of a part of a whole (0 to 1, or null for unknown), with its words. */
export function Meter({ part, words, label, level = "" }) {
  const size = part === null || part === undefined ? 0 : Math.min(1, Math.max(0, part));
  return html`<span class=${`meter ${level}`}><span>${words}</span><i role="img" aria-label=${`${label}: ${words}`}><b ref=${(node) => node && node.style.setProperty("width", `${(size * 100).toFixed(1)}%`)} /></i></span>`;
}
/** A small curve without axes; values are 0 to top. */
export function Spark({ values, top, label, className = "" }) {
  const known = values.filter((value) => typeof value === "number");
  if (known.length < 2) return html`<span class="spark none" />`;
  const most = top || Math.max(...known, 1e-9), step = 100 / (values.length - 1);
  let path = "", pen = "M";
  values.forEach((value, i) => {
    if (typeof value !== "number") { pen = "M"; return; }
    path += `${pen}${(i * step).toFixed(1)} ${(23 - (22 * Math.min(value, most)) / most).toFixed(1)}`;
    pen = "L";
  });
  return html`<svg class=${`spark ${className}`} viewBox="0 0 100 24" preserveAspectRatio="none" role="img" aria-label=${label}><path d=${path} /></svg>`;
}

// ---- Doing ----------------------------------------------------------------------------------------------------------
const sayings = new Set();
/** Tells the viewer what was done, with one button to take it back where that is possible. */
export function said(text, undo = null) { for (const tell of sayings) tell({ text, undo, at: Date.now() }); }
export function Said() {
  const [last, set] = useState(null);
  useEffect(() => { sayings.add(set); return () => sayings.delete(set); }, []);
  useEffect(() => {
    if (!last) return undefined;
    const timer = setTimeout(() => set(null), last.undo ? 15000 : 8000);
    return () => clearTimeout(timer);
  }, [last]);
  return html`<div class="said" role="status">${last && html`<p class="card"><span>${last.text}</span>
    ${last.undo && html`<button type="button" class="plain" onClick=${() => { set(null); last.undo(); }}>${t("undo")}</button>`}
    <button type="button" class="plain" aria-label=${t("close")} onClick=${() => set(null)}><${Icon} name="failed" /></button></p>`}</div>`;
}
/** Sends a change, says what came of it and asks everything again. Answers the reply, or null when it was refused; a form
    takes the Problem by `refused` to show it in its place. */
export async function act(path, { method = "POST", body = {}, done, undo = null, refused = null }) {
  try {
    const answer = await ask(path, { method, body });
    said(typeof done === "function" ? done(answer) : done, undo);
    return answer;
  } catch (problem) {
    if (refused && problem.status) refused(problem); else said(problem.status ? problem.message : t("lost_first"));
    return null;
  } finally {
    soon(0);
  }
}
/** A button that asks once more before it acts. */
export function SureButton({ onSure, children, sure, className = "danger", label = null }) {
  const [isArmed, arm] = useState(false);
  useEffect(() => {
    if (!isArmed) return undefined;
    const timer = setTimeout(() => arm(false), 4000);
    return () => clearTimeout(timer);
  }, [isArmed]);
  return html`<button type="button" class=${isArmed ? `${className} armed` : className} aria-label=${isArmed ? null : label}
    onClick=${() => { if (isArmed) onSure(); arm(!isArmed); }}>${isArmed ? sure : children}</button>`;
}
/** A dialog of the browser's own: focus stays in it, Escape closes it, and so does a click beside it unless it `isFirm`. */
export function Dialog({ title, onClose, children, className = "", isFirm = false }) {
  const node = useRef(null);
  useEffect(() => {
    node.current.showModal();
    node.current.querySelector("form :is(input, select, textarea)")?.focus();  // rather than the button that closes it
  }, []);
  return html`<dialog ref=${node} class=${className} aria-label=${title} onClose=${onClose} onClick=${(event) => !isFirm && event.target === node.current && node.current.close()}>
    <div class="dialog-body"><div class="head"><h2>${title}</h2><button type="button" class="plain" onClick=${() => node.current.close()}>${t("close")}</button></div>${children}</div></dialog>`;
}
/** Asks for a reason, then acts; `onReason(reason)` gets "" when none was written. */
export function ReasonDialog({ title, help, button, onReason, onClose }) {
  const [reason, set] = useState("");
  return html`<${Dialog} title=${title} onClose=${onClose}><form onSubmit=${(event) => { event.preventDefault(); onReason(reason.trim()); onClose(); }}>
    ${help && html`<p class="quiet">${help}</p>`}
    <label class="field"><span>${t("reason")}</span><input value=${reason} maxLength="200" onInput=${(event) => set(event.target.value)} /></label>
    <button type="submit" class="main">${button}</button></form></${Dialog}>`;
}
export const Field = ({ label, help, problem, children, className = "" }) => html`<label class=${`field ${className}`}><span>${label}</span>${children}
  ${help && html`<small>${help}</small>`}${problem && html`<small class="wrong" role="alert">${problem}</small>`}</label>`;

function useCopied() {
  const [isCopied, set] = useState(false);
  const copy = async (text) => {
    try { await navigator.clipboard.writeText(text); } catch { return; }
    set(true);
    setTimeout(() => set(false), 1500);
  };
  return [isCopied, copy];
}
/** A line to paste. Browsers offer copying over HTTPS and on localhost only; the text selects as a whole everywhere. */
export function Command({ text }) {
  const [isCopied, copy] = useCopied();
  return html`<p class="command"><code>${text}</code>${navigator.clipboard && html`<button type="button" class="plain copy" onClick=${() => copy(text)}>${t(isCopied ? "copied" : "copy")}</button>`}</p>`;
}
/** The question behind a view, for a terminal. */
export function CurlButton({ path, method, body }) {
  const [isCopied, copy] = useCopied();
  const [isShown, show] = useState(false);
  const text = curl(path, { method, body });
  return html`<button type="button" class="plain curl" title=${text} onClick=${() => (navigator.clipboard ? copy(text) : show(true))}>${t(isCopied ? "copied" : "as_curl")}</button>
    ${isShown && html`<${Dialog} title=${t("as_curl")} onClose=${() => show(false)}><${Command} text=${text} /></${Dialog}>`}`;
}

// ---- Going ----------------------------------------------------------------------------------------------------------
/** The address of a view: link("tasks", 7), link("tasks", null, {status: "failed"}). */
export const link = (view, id = null, values = {}) => `#/${view}${id === null ? "" : `/${encodeURIComponent(id)}`}${query(values)}`;
export function readAddress() {
  const [path, search = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [view, ...rest] = path.split("/");
  let id = null;
  try { id = rest.length ? decodeURIComponent(rest.join("/")) : null; } catch { /* no address of ours */ }
  return { view: view || "overview", id, values: Object.fromEntries(new URLSearchParams(search)) };
}
/** Goes on with other values in the address; what is empty leaves it. `replace`: the browser's Back does not stop here. */
export function goWith(changes, { replace = false } = {}) {
  const { view, id, values } = readAddress();
  const next = link(view, id, { ...values, ...changes });
  if (!replace) { location.hash = next; return; }
  history.replaceState(null, "", next);
  dispatchEvent(new HashChangeEvent("hashchange"));
}
/** Links to the next page and back to the first one. */
export function Pages({ next, cursor }) {
  return (next || cursor) && html`<nav class="pages" aria-label=${t("pages")}>
    ${cursor && html`<button type="button" class="plain" onClick=${() => goWith({ cursor: "" })}>${t("first_page")}</button>`}
    ${next && html`<button type="button" class="plain" onClick=${() => goWith({ cursor: next })}>${t("next_page")}</button>`}</nav>`;
}
export const TaskLink = ({ id }) => html`<a href=${link("tasks", id)}>${t("task_number", { id })}</a>`;
export const DeviceLink = ({ id, name }) => (id ? html`<a href=${link("devices", id)}>${name || id}</a>` : "–");
export const BatchLink = ({ name }) => (name ? html`<a href=${link("batches", name)}>${name}</a>` : "–");
