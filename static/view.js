/* How does an answer look? Turns what the API said into nodes, and patches them in place, so that focus, open details
   and the place on the page survive a refresh. It asks the master nothing, and text enters by textContent only. */
import en from "./strings.en.js";
import zh from "./strings.zh.js";

export const STATES = ["scheduled", "pending", "assigned", "running", "completed", "failed", "cancelled"];
const TONE = {
  scheduled: "violet", pending: "amber", assigned: "blue", running: "cyan", completed: "green", failed: "red", cancelled: "gray",
  snoozed: "violet", timeout: "red", released: "amber",
  online: "green", busy: "cyan", off: "red", stopped: "gray", draining: "amber", disabled: "gray", conflict: "red",
};
const ICON = {
  all: "M3 4.5h10M3 8h10M3 11.5h10", scheduled: "M8 2.2a5.8 5.8 0 1 0 0 11.6A5.8 5.8 0 0 0 8 2.2M8 5v3.2l2 1.3", pending: "M3.5 8h.01M8 8h.01M12.5 8h.01",
  assigned: "M2.5 8h10M9 4.5 12.5 8 9 11.5", running: "M5 3.2v9.6L12.5 8z", completed: "M3 8.5 6.5 12 13 4.5", failed: "M4 4l8 8M12 4l-8 8", cancelled: "M3.5 8h9",
  snoozed: "scheduled", timeout: "scheduled", released: "M13.5 8h-10M7 4.5 3.5 8 7 11.5",
  online: "completed", busy: "running", off: "failed", stopped: "cancelled", draining: "M8 2.5v10M4.5 9 8 12.5 11.5 9", disabled: "cancelled", conflict: "M8 3v6M8 12.5h.01",
};
const SHOWN_CHARACTERS = 20000;
const DEVICES_SHOWN = 20;
const CLOCK_SKEW_SHOWN = 30;  // seconds
const DEVICE_ORDER = { conflict: 0, online: 1, busy: 1, draining: 2, off: 3, stopped: 4, disabled: 4 };

export const byId = (id) => document.getElementById(id);
let words = en, locale = "en", skew = 0;

// ---- Words, numbers, times ------------------------------------------------------------------------------------------
export function useLanguage(language) {
  words = language === "zh" ? zh : en;
  const wanted = language === "zh" ? "zh" : "en";
  locale = (navigator.languages || []).find((tag) => tag.toLowerCase().startsWith(wanted)) || (wanted === "zh" ? "zh-CN" : "en-GB");
  document.documentElement.lang = wanted === "zh" ? "zh-CN" : "en";
  document.title = words.title;
  for (const node of document.querySelectorAll("[data-t]")) say(node, t(node.dataset.t));
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", t(node.dataset.label));
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = t(node.dataset.placeholder);
  const other = language === "zh" ? en : zh;
  say(byId("language"), other.language).lang = language === "zh" ? "en" : "zh-CN";
}
/** The words of a key, with {braces} filled in; a key without words (a newer master's state) is shown as it is. */
export function t(key, values = {}) {
  return (Object.hasOwn(words, key) ? words[key] : String(key)).replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}
export const number = (n) => new Intl.NumberFormat(locale).format(n ?? 0);
const big = (n) => (n < 1e6 ? number(n) : new Intl.NumberFormat(locale.startsWith("zh") ? locale : "en", { notation: "compact", maximumFractionDigits: 2 }).format(n));
const unit = (n, name, digits = 0) => new Intl.NumberFormat(locale, { style: "unit", unit: name, unitDisplay: "narrow", maximumFractionDigits: digits }).format(n);
/** 3ms, 0.25s, 42s, 5m 12s, 3h 20m, 2d 4h. */
export function duration(seconds, exact = false) {
  const whole = Math.max(0, Math.floor(seconds));
  if (exact && seconds < 0.1) return unit(seconds * 1000, "millisecond");
  if (exact && seconds < 10) return unit(seconds, "second", 2);
  for (const [size, name, small, smallName] of [[86400, "day", 3600, "hour"], [3600, "hour", 60, "minute"], [60, "minute", 1, "second"]]) {
    const rest = Math.floor((whole % size) / small);
    if (whole >= size) return unit(Math.floor(whole / size), name) + (rest ? ` ${unit(rest, smallName)}` : "");
  }
  return unit(whole, "second");
}
const bytes = (n) => (n >= 1e9 ? unit(n / 1e9, "gigabyte", 1) : n >= 1e6 ? unit(n / 1e6, "megabyte", 1) : unit(n / 1e3, "kilobyte"));
/** The viewer's clock may be wrong: ages are counted on the master's, known to a second from its Date header. */
export function setMasterClock(date) {
  const offset = Date.parse(date) - Date.now();
  skew = Math.abs(offset) > 2000 ? offset : 0;
}
export const now = () => Date.now() + skew;
export function clock(iso) {
  const at = new Date(iso);
  const today = at.toDateString() === new Date().toDateString();
  return new Intl.DateTimeFormat(locale, today ? { timeStyle: "medium" } : { dateStyle: "medium", timeStyle: "short" }).format(at);
}
function moment(node, iso) {
  node.dateTime = iso;
  node.title = `${String(iso).replace("T", " ").replace("Z", "")} UTC`;
  say(node, clock(iso));
}
/** An age that counts on by itself; `key` is a sentence with {age}. */
function ageing(node, at, key) {
  Object.assign(node.dataset, { at, key });
  say(node, t(key, { age: duration((now() - at) / 1000) }));
}
function still(node, text) { delete node.dataset.at; return say(node, text); }
export function tick() {
  for (const node of document.querySelectorAll("[data-at]")) say(node, t(node.dataset.key, { age: duration((now() - node.dataset.at) / 1000) }));
}

// ---- Nodes ----------------------------------------------------------------------------------------------------------
export function say(node, text) {
  const wanted = text === null || text === undefined ? "" : String(text);
  if (node.textContent !== wanted) node.textContent = wanted;
  return node;
}
function el(tag, className = "", ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}
const show = (node, isShown) => { node.hidden = !isShown; return isShown; };
function icon(name) {
  const path = ICON[ICON[name]] || ICON[name] || "M8 8h.01";
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 16 16"); svg.setAttribute("class", "icon"); svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS("http://www.w3.org/2000/svg", "path"));
  svg.firstChild.setAttribute("d", path);
  return svg;
}
function pill(holder, name) {
  const mark = `${name} ${document.documentElement.lang}`;
  if (holder.dataset.pill === mark) return;
  holder.dataset.pill = mark;
  const node = el("span", `pill ${TONE[name] || "gray"}`, icon(name), t(name));
  if (Object.hasOwn(words, `about_${name}`)) node.title = t(`about_${name}`);
  holder.replaceChildren(node);
}
/** Makes the children of `holder` those of `items`, in order, reusing a node by its key. */
function patch(holder, items, keyOf, create, update) {
  const old = new Map([...holder.children].map((node) => [node.dataset.row, node]));
  items.forEach((item, i) => {
    const key = String(keyOf(item));
    const node = old.get(key) || create(item);
    old.delete(key);
    node.dataset.row = key;
    update(node, item);
    if (holder.children[i] !== node) holder.insertBefore(node, holder.children[i] || null);
  });
  for (const node of old.values()) node.remove();
}
function row(cells) {
  const node = el("tr", "", ...cells.map((children) => { const cell = el("td", "", ...children); cell.setAttribute("role", "cell"); return cell; }));
  node.setAttribute("role", "row");
  return node;
}
/** The address of this page with a filter (and a task) in it. */
export function address(filter) {
  const query = new URLSearchParams(Object.entries(filter).filter(([, value]) => value));
  return `#${query}`;
}

// ---- Overview -------------------------------------------------------------------------------------------------------
export function showOverview(overview, filter) {
  const counts = overview.tasks || {};
  const total = STATES.reduce((sum, name) => sum + (counts[name] || 0), 0);
  patch(byId("tiles"), ["all", ...STATES], (name) => name, (name) => {
    const tile = el("a", `tile ${name === "all" ? "all" : TONE[name]}`, el("b"), el("span", "", icon(name), el("span")));
    tile.title = t(`about_${name}`);
    return tile;
  }, (tile, name) => {
    const n = name === "all" ? total : counts[name] || 0;
    const isChosen = (filter.status || "all") === name;
    say(tile.firstChild, big(n)).title = n < 1e6 ? "" : number(n);
    say(tile.lastChild.lastChild, t(name));
    tile.title = t(`about_${name}`);
    tile.href = address({ ...filter, task: "", status: name === "all" ? "" : name });
    tile.classList.toggle("zero", n === 0);
    if (isChosen) tile.setAttribute("aria-current", "true"); else tile.removeAttribute("aria-current");
  });
  patch(byId("shares"), STATES, (name) => name, (name) => el("i", TONE[name]), (bar, name) => { bar.style.flexGrow = counts[name] || 0; });
  const rates = overview.rates || {};
  say(byId("rates"), t("rates", { minute: number(rates.completed_last_minute), minute_failed: number(rates.failed_last_minute), hour: number(rates.completed_last_hour), hour_failed: number(rates.failed_last_hour) }));
  say(byId("about"), t("about", { mode: overview.mode, version: overview.version, uptime: duration(overview.uptime_seconds), strategy: overview.strategy, database: bytes(overview.database_bytes) }));
  const oldest = overview.oldest_waiting;
  if (show(byId("oldest"), Boolean(oldest))) {
    const link = el("a", "", t("task_number", { id: oldest.task_id }));
    link.href = address({ ...filter, task: oldest.task_id });
    const [before, after] = t("oldest", { age: duration(oldest.waiting_seconds), why: why(oldest) }).split("{task}");
    const whole = before + link.textContent + after;
    if (byId("oldest").textContent !== whole || byId("oldest").querySelector("a").hash !== link.hash) byId("oldest").replaceChildren(before, link, after);
  }
}
/** A waiting reason in the page's language where it has words for it, else the master's own sentence. */
function why(waiting) {
  const known = `why_${waiting.reason}`;
  return Object.hasOwn(words, known) ? t(known) : sentence(waiting.detail || waiting.reason);
}
const sentence = (text) => (text ? text[0].toUpperCase() + text.slice(1) + (/[.!?。)]$/.test(text) ? "" : ".") : "");

// ---- Devices --------------------------------------------------------------------------------------------------------
/** The lines to paste on a new machine; `url` is the master as this browser sees it. */
export function showAddDevice({ isOpen, hasNone, hasFile, needsKey, url, isLoopback }) {
  byId("add-device").setAttribute("aria-expanded", String(isOpen || hasNone));
  show(byId("add-device"), !hasNone);
  if (!show(byId("add-panel"), isOpen || hasNone)) return;
  show(byId("no-devices"), hasNone);
  say(byId("add-how"), t(hasFile ? "add_one_line" : "add_not_built"));
  const key = needsKey ? "AF_API_KEY=YOUR_KEY " : "", flags = `--device-id shop-7 --master-url "${url}"`;
  // The quotes and -g are for an IPv6 address in brackets, which shells and curl would take for a pattern.
  say(byId("worker-command"), hasFile ? `curl -fsSgO "${url}/edge/worker.pyz" && ${key}python3 worker.pyz ${flags}` : `${key}python worker.py ${flags}`);
  const windowsKey = needsKey ? '$env:AF_API_KEY = "YOUR_KEY"; ' : "";
  say(byId("windows-command"), `Invoke-WebRequest -UseBasicParsing "${url}/edge/worker.pyz" -OutFile worker.pyz; ${windowsKey}py worker.pyz ${flags}`);
  show(byId("add-unix"), hasFile);
  show(byId("add-windows"), hasFile);
  show(byId("add-key"), needsKey);
  show(byId("add-loopback"), hasFile && isLoopback);
}
export function showDevices(devices, everyDevice) {
  const status = (device) => (device.status !== "offline" ? device.status : device.has_stopped ? "stopped" : "off");
  const sorted = devices.map((device) => ({ ...device, status: status(device) }))
    .sort((a, b) => (DEVICE_ORDER[a.status] ?? 1) - (DEVICE_ORDER[b.status] ?? 1) || String(a.device_id).localeCompare(String(b.device_id)));
  const tally = {};
  for (const device of sorted) tally[device.status] = (tally[device.status] || 0) + 1;
  say(byId("device-summary"), Object.entries(tally).map(([name, n]) => `${number(n)} ${t(name)}`).join(" · "));
  show(byId("device-table"), devices.length > 0);
  if (show(byId("more-devices"), !everyDevice && devices.length > DEVICES_SHOWN)) say(byId("more-devices").firstChild, t("more_devices", { n: number(devices.length) }));
  patch(byId("device-rows"), everyDevice ? sorted : sorted.slice(0, DEVICES_SHOWN), (device) => device.device_id, () => {
    return row([[el("span", "name"), el("span", "small"), el("span", "reason amber")], [], [el("span")], [meter()], [meter()], [meter()], [meter()], [el("span"), el("span", "small")]]);
  }, (node, device) => {
    const cells = node.children;
    say(cells[0].firstChild, device.device_name || device.device_id);
    say(cells[0].children[1], [device.device_name && device.device_name !== device.device_id ? device.device_id : "", ...(device.tags || []), device.wanted_reason].filter(Boolean).join(" · "));
    say(cells[0].lastChild, ["off", "stopped"].includes(device.status) ? "" : troubles(device));
    cells[0].title = [device.device_type, device.ip_address, device.version, (device.task_types || []).join(", ")].filter(Boolean).join(" · ");
    pill(cells[1], device.status);
    if (device.seconds_since_heartbeat === null || device.seconds_since_heartbeat === undefined) still(cells[2].firstChild, t("never"));
    else ageing(cells[2].firstChild, Math.round((now() - device.seconds_since_heartbeat * 1000) / 1000) * 1000, "ago");
    if (device.last_heartbeat_at) cells[2].title = `${clock(device.last_heartbeat_at)} · ${device.last_heartbeat_at} UTC`;
    // A device queues only when its slots are taken, so what is over their number waits there.
    const slots = device.max_concurrent_tasks || 0, held = device.assigned_count ?? device.active_tasks ?? 0, busy = Math.min(held, slots);
    const load = t("of", { n: number(busy), limit: number(slots) });
    fill(cells[3], t("load"), slots ? (100 * busy) / slots : 0, held > slots ? `${load} ${t("queued", { n: number(held - slots) })}` : load, "");
    for (const [i, name] of [[4, "cpu"], [5, "memory"], [6, "disk"]]) {
      const used = device[`${name}_usage`];
      const isKnown = typeof used === "number" && device.status !== "off";  // an old figure would mislead
      fill(cells[i], t(name), isKnown ? used : 0, isKnown ? `${Math.round(used)}%` : "–", used >= 95 ? "red" : used >= 85 ? "amber" : "", isKnown ? "" : t("unknown"));
    }
    [cells[2].dataset.name, cells[7].dataset.name] = [t("heartbeat"), t("done_failed")];
    say(cells[7].firstChild, `${number(device.completed_count)} / ${number(device.failed_count)}`);
  });
}
/** What a device says of itself, or its clock says of it; a word that a newer device sends is shown as it is. */
function troubles(device) {
  const skew = device.clock_skew_seconds ?? 0;
  const clock = Math.abs(skew) > CLOCK_SKEW_SHOWN ? t(skew > 0 ? "clock_ahead" : "clock_behind", { age: duration(Math.abs(skew)) }) : "";
  return [device.problem && t(Object.hasOwn(words, `problem_${device.problem}`) ? `problem_${device.problem}` : device.problem), clock].filter(Boolean).join(" ");
}
const meter = () => el("span", "meter", el("span"), el("i"));
function fill(cell, name, percent, text, tone, title = "") {
  cell.dataset.name = name;
  const [label, bar] = cell.firstChild.children;
  say(label, text).className = "";
  bar.className = tone;
  bar.style.setProperty("--fill", `${Math.min(100, Math.max(0, percent))}%`);
  cell.title = title;
}

// ---- The task list --------------------------------------------------------------------------------------------------
export function showTasks(answer, filter, reasons, command) {
  const { tasks, problem } = answer;
  const isFiltered = Boolean(filter.status || filter.batch || filter.text);
  show(byId("task-table"), tasks.length > 0);
  if (show(byId("no-tasks"), tasks.length === 0 && !isFiltered && !problem)) say(byId("submit-command"), command);
  show(byId("no-match"), tasks.length === 0 && isFiltered && !problem);
  const note = problem || (answer.partial ? t("partial") : answer.next_cursor && answer.isLongest ? t("capped", { n: number(tasks.length) }) : "");
  if (show(byId("task-note"), Boolean(note))) say(byId("task-note"), note);
  show(byId("more-tasks"), Boolean(answer.next_cursor && !answer.isLongest));
  patch(byId("task-rows"), tasks, (task) => task.id, () => {
    return row([[], [el("a", "open"), el("span", "small")], [el("span", "what"), el("span", "reason")], [el("span")], [el("span")], [el("time"), el("span", "small")]]);
  }, (node, task) => {
    const cells = node.children;
    pill(cells[0], task.status);
    say(cells[1].firstChild, `#${task.id}`).href = address({ ...filter, task: task.id });
    cells[1].firstChild.setAttribute("aria-label", `${t("task_number", { id: task.id })}, ${task.task_type}, ${t(task.status)}`);
    say(cells[1].lastChild, task.task_type);
    say(cells[2].firstChild, subject(task));
    const [text, tone] = remark(task, reasons);
    Object.assign(say(cells[2].lastChild, text), { className: `reason ${tone}`, title: text });
    say(cells[3].firstChild, task.assigned_device_id);
    say(cells[4].firstChild, task.attempt_count ? number(task.attempt_count) : "");
    moment(cells[5].firstChild, task.created_at);
    since(cells[5].lastChild, task);
  });
}
const dates = (task) => [task.start_date, task.end_date].filter(Boolean).join(" – ");
function subject(task) {
  const key = task.unique_key && !task.unique_key.startsWith("content-") ? task.unique_key : "";
  const named = [task.username, task.app_id, dates(task)].filter(Boolean).join(" · ") || key;
  return [named, task.batch].filter(Boolean).join(key && named === key ? "  ·  " : " · ") || "–";
}
const ended = (task) => (Object.hasOwn(words, `reason_${task.end_reason}`) ? t(`reason_${task.end_reason}`) : "");
/** The one line that says how it stands: an error, why it waits, when it comes again; and its tone. */
function remark(task, reasons) {
  const last = task.error_message ? t("last_error", { error: task.error_message }) : "";
  if (task.status === "failed") return [[ended(task), task.error_message].filter(Boolean).join(": "), "red"];
  if (task.status === "cancelled") return [task.error_message || "", ""];
  if (task.status === "scheduled") return [[task.next_run_at && t(task.attempt_count ? "again" : "due", { time: clock(task.next_run_at) }), last].filter(Boolean).join(" · "), "violet"];
  if (task.status === "pending") {
    const reason = reasons.get(laneOf(task));
    return [[reason && why(reason), last].filter(Boolean).join(" · "), "amber"];
  }
  return ["", ""];
}
/** Tasks of one lane wait for the same reason, so one question answers for all of them. */
export const laneOf = (task) => (task.lane_id ? `lane ${task.lane_id}` : `task ${task.id}`);
function since(node, task) {
  if (task.status === "pending") ageing(node, Date.parse(task.updated_at || task.created_at), "waiting");
  else if (task.status === "running" && task.started_at) ageing(node, Date.parse(task.started_at), "running_for");
  else if (task.status === "assigned") ageing(node, Date.parse(task.updated_at), "sent");
  else if (task.started_at && task.finished_at) still(node, t("took", { age: duration((Date.parse(task.finished_at) - Date.parse(task.started_at)) / 1000, true) }));
  else still(node, "");
}

// ---- One task -------------------------------------------------------------------------------------------------------
export function showTask(task, problem, filter, api) {
  show(byId("dialog-problem"), Boolean(problem));
  say(byId("dialog-problem"), problem);
  show(byId("dialog-content"), Boolean(task));
  for (const id of ["cancel", "requeue", "dialog-raw", "dialog-state"]) show(byId(id), Boolean(task));
  if (!task) return;
  say(byId("dialog-title"), `#${task.id} · ${task.task_type}`);
  pill(byId("dialog-state"), task.status);
  byId("dialog-raw").href = `${api}/tasks/${task.id}`;
  show(byId("cancel"), ["scheduled", "pending", "assigned", "running"].includes(task.status));
  show(byId("requeue"), ["failed", "cancelled"].includes(task.status));
  showWaiting(task);
  const error = [ended(task), task.error_message].filter(Boolean).join(": ");
  if (show(byId("dialog-error"), Boolean(error))) say(byId("dialog-error"), error).className = `note ${task.status === "failed" ? "red" : "gray"}`;
  const facts = [
    ["username"], ["app_id"], ["dates", dates(task)], ["batch", task.batch, { batch: task.batch }], ["unique_key"], ["priority"], ["device", task.assigned_device_id],
    ["pinned", task.pinned_device_id], ["tags", (task.required_tags || []).join(", ")], ["created", task.created_at, "time"], ["started", task.started_at, "time"], ["finished", task.finished_at, "time"],
    ["next_run", task.status === "scheduled" ? task.next_run_at : "", "time"], ["gives_up", STATES.indexOf(task.status) < 2 ? task.give_up_at : "", "time"],
    ["retries", t("of", { n: number(task.retry_count), limit: number(task.max_retry_count) })], ["losses", task.lost_count || ""], ["snoozes", task.snooze_count || ""],
    ["timeout_seconds", task.execution_timeout ? duration(task.execution_timeout) : ""], ["parent", task.parent_id, { task: task.parent_id }], ["children", task.children_count || ""], ["created_by"],
  ].map(([name, value = task[name], kind]) => ({ name, value, kind })).filter((fact) => fact.value !== "" && fact.value !== null && fact.value !== undefined);
  patch(byId("dialog-facts"), facts, (fact) => fact.name, (fact) => {
    return el("div", "", el("dt"), el("dd", "", el(fact.kind === "time" ? "time" : fact.kind ? "a" : "span")));
  }, (node, { name, value, kind }) => {
    say(node.firstChild, t(name));
    const inner = node.lastChild.firstChild;
    if (kind === "time") moment(inner, value); else say(inner, name === "parent" ? `#${value}` : value);
    if (inner.localName === "a") inner.href = address(kind.task ? { ...filter, ...kind } : kind);
  });
  showAttempts(task.attempts || []);
  showFiles(task, api);
  showJson("result", task.result);
  showJson("data", task.task_data && Object.keys(task.task_data).length ? task.task_data : null);
}
function showWaiting(task) {
  const waiting = task.status === "scheduled" ? remark(task, new Map())[0] : task.status === "pending" && task.waiting ? why(task.waiting) : "";
  if (show(byId("dialog-why"), Boolean(waiting))) say(byId("dialog-why"), waiting).className = `note ${TONE[task.status]}`;
  const excluded = (task.excluded || []).filter((one) => one.excluded_because).slice(0, DEVICES_SHOWN);
  show(byId("why-part"), excluded.length > 0);
  patch(byId("dialog-devices"), excluded, (one) => one.device_id, () => el("li", "", el("b"), " ", el("span")), (node, one) => {
    say(node.firstChild, one.device_id);
    say(node.lastChild, one.excluded_because);
  });
}
function showFiles(task, api) {
  const files = task.artifacts || [];
  show(byId("files-part"), files.length > 0);
  patch(byId("dialog-files"), files, (file) => file.artifact_id, () => el("li", "", el("a"), " ", el("span", "quiet")), (node, file) => {
    say(node.firstChild, file.name).href = `${api}/tasks/${task.id}/artifacts/${file.artifact_id}`;
    node.firstChild.setAttribute("download", file.name);
    node.firstChild.title = `sha256 ${file.sha256}`;
    // Only the attempt that counts is the usual case; a file of another one says so.
    say(node.lastChild, [bytes(file.bytes), file.assignment_id === task.assignment_id ? "" : t("attempt", { id: file.assignment_id })].filter(Boolean).join(" · "));
  });
}
function showJson(name, value) {
  if (!show(byId(`${name}-part`), value !== null && value !== undefined)) return;
  const text = JSON.stringify(value, null, 2);
  say(byId(`dialog-${name}`), text.length > SHOWN_CHARACTERS ? `${text.slice(0, SHOWN_CHARACTERS)}\n${t("cut")}` : text);
}
function progress(attempt) {
  const part = attempt.progress === null ? "" : `${Math.round(attempt.progress * 100)}%`;
  return [part, attempt.progress_message].filter(Boolean).join(" · ");
}
function showAttempts(attempts) {
  const newestFirst = [...attempts].sort((a, b) => b.id - a.id);
  if (!newestFirst.length) { byId("dialog-attempts").replaceChildren(el("p", "quiet", t("no_attempts"))); return; }
  for (const node of byId("dialog-attempts").querySelectorAll(":scope > p")) node.remove();
  patch(byId("dialog-attempts"), newestFirst, (attempt) => attempt.id, (attempt) => {
    const log = el("pre");
    log.tabIndex = 0;
    const node = el("details", "", el("summary", "", el("span"), el("span"), el("b"), el("span", "quiet"), el("time")), el("div", "attempt", el("p", "wrong"), el("p", "quiet"), log));
    node.open = attempt === newestFirst[0];
    return node;
  }, (node, attempt) => {
    const [state, id, device, took, at] = node.firstChild.children;
    const [error, late, log] = node.lastChild.children;
    pill(state, attempt.status);
    say(id, t("attempt", { id: attempt.id })).className = "unseen";
    say(device, attempt.device_id);
    const isOpen = ["assigned", "running"].includes(attempt.status);
    say(took, isOpen ? progress(attempt) : attempt.duration_seconds === null || attempt.duration_seconds === undefined ? "" : duration(attempt.duration_seconds, true));
    moment(at, attempt.started_at || attempt.assigned_at);
    say(error, [attempt.error_type && t(Object.hasOwn(words, `reason_${attempt.error_type}`) ? `reason_${attempt.error_type}` : attempt.error_type), attempt.error_message].filter(Boolean).join(": "));
    say(late, attempt.late_outcome ? t("late", { outcome: t(attempt.late_outcome) }) : "");
    say(log, attempt.log_tail || t("no_log"));
  });
}
