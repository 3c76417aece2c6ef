/* When does the page ask the master, and for what? It holds the address (filter and open task live in the hash), the
   refresh (an event brings it within a second, else every five), the key form and the two actions. How answers look
   is view.js' question. It uses only the public API and never keeps the key. */
import * as view from "./view.js";
import { byId, say, t } from "./view.js";

const API = "/api/distribution";
const POLL_MS = 5000, AFTER_EVENT_MS = 1000, PATIENCE_MS = 10000, STREAM_RETRY_MS = 15000, SURE_MS = 4000, BREATH_MS = 200, LONGEST_RETRY_MS = 3000;
const PAGE_SIZE = 30, LONGEST_PAGE = 200, REASONS_A_REFRESH = 10, REASON_KEPT_MS = 4000, FEW_DEVICES = 100;

const memory = {  // a browser may forbid storage; then the page just forgets
  get(name) { try { return localStorage.getItem(`af.${name}`); } catch { return null; } },
  set(name, value) { try { localStorage.setItem(`af.${name}`, value); } catch { /* forgotten */ } },
};
let language = memory.get("language") || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
let filter = {}, taskId = "", limit = PAGE_SIZE, everyDevice = false, isAdding = false;
let overview = null, devices = null, devicesAt = 0, tasks = null, task = null, taskProblem = "";
const reasons = new Map();  // lane -> {reason, detail, at}

// ---- Asking ---------------------------------------------------------------------------------------------------------
class Problem extends Error {
  constructor(status, detail) { super(detail); this.status = status; }
}
async function ask(path, body) {
  const options = { headers: { Accept: "application/json" }, credentials: "same-origin", cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) };
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
  const response = await fetch(API + path, options);
  if (response.headers.get("Date")) view.setMasterClock(response.headers.get("Date"));
  if (response.ok) return response.status === 204 ? null : response.json();
  const answer = await response.json().catch(() => ({}));
  throw new Problem(response.status, answer.detail || response.statusText);
}
const isRefusal = (problem) => problem.status >= 400 && problem.status < 500 && ![401, 408, 429].includes(problem.status);

async function askTasks() {
  const query = new URLSearchParams({ ...filter, limit });
  try {
    return { ...await ask(`/tasks?${query}`), isLongest: limit >= LONGEST_PAGE };
  } catch (problem) {
    if (!isRefusal(problem)) throw problem;
    return { tasks: [], next_cursor: null, problem: problem.message };  // the filter was refused; the page itself is well
  }
}
async function askDevices() {
  const isDue = !devices || devices.length <= FEW_DEVICES || performance.now() - devicesAt > POLL_MS;
  if (!isDue) return devices;
  devicesAt = performance.now();
  return (await ask("/devices")).devices;
}
async function askReasons(listed) {
  const now = performance.now();
  const lanes = new Map(listed.filter((one) => one.status === "pending").map((one) => [view.laneOf(one), one.id]));
  for (const lane of reasons.keys()) if (!lanes.has(lane)) reasons.delete(lane);
  const due = [...lanes].filter(([lane]) => !(now - reasons.get(lane)?.at < REASON_KEPT_MS)).slice(0, REASONS_A_REFRESH);
  await Promise.all(due.map(async ([lane, id]) => {
    try {
      const answer = await ask(`/tasks/${id}/why`);
      if (answer.status === "pending") reasons.set(lane, { ...answer, at: now });
    } catch (problem) {
      if (!isRefusal(problem)) throw problem;
    }
  }));
}
async function askTask() {
  const id = taskId;
  if (!id) return;
  let found = null, trouble = "";
  try {
    found = await ask(`/tasks/${encodeURIComponent(id)}`);
    if (found.status === "pending") found.excluded = (await ask(`/tasks/${encodeURIComponent(id)}/why`)).devices;
  } catch (problem) {
    if (!isRefusal(problem)) throw problem;
    trouble = problem.status === 404 || problem.status === 410 ? t("not_found", { id }) : problem.message;
  }
  if (id === taskId) [task, taskProblem] = [found, trouble];
}

// ---- Refreshing -----------------------------------------------------------------------------------------------------
let timer = 0, due = Infinity, isAsking = false, isLate = false, lastStart = -Infinity;
let answeredAt = null, failures = 0, isSignedOut = false;

function refreshIn(ms) {
  const at = performance.now() + ms;
  if (at >= due) return;
  due = at;
  clearTimeout(timer);
  timer = setTimeout(refresh, ms);
}
const refreshSoon = () => { if (!document.hidden && !isSignedOut) refreshIn(Math.max(0, lastStart + AFTER_EVENT_MS - performance.now())); };

async function refresh() {
  clearTimeout(timer);
  due = Infinity;
  if (isAsking) { isLate = true; return; }
  isAsking = true;
  lastStart = performance.now();
  try {
    const asked = JSON.stringify([filter, limit]);
    const first = await ask("/system/overview");  // alone, so that a refusal or a dead master costs one request
    const answers = [first, ...await Promise.all([askDevices(), askTasks(), askTask()])];
    await askReasons(answers[2].tasks);
    if (asked === JSON.stringify([filter, limit])) tasks = answers[2]; else isLate = true;
    [overview, devices] = answers;
    [answeredAt, failures, isSignedOut] = [new Date(), 0, false];
    byId("banner").hidden = true;
    draw();
    listen();
  } catch (problem) {
    if (problem.status === 401) askForKey(); else tellLoss(problem);
  } finally {
    isAsking = false;
    if (!isSignedOut && !document.hidden) refreshIn(isLate ? BREATH_MS : failures ? Math.min(LONGEST_RETRY_MS, 500 * 2 ** failures) : POLL_MS);
    isLate = false;
    tellLink();
  }
}

// One stream a tab, and none while the tab is hidden: a browser opens at most six connections to one master.
let stream = null, streamTriedAt = -Infinity;
function listen() {
  if (stream || document.hidden || performance.now() - streamTriedAt < STREAM_RETRY_MS) return;
  streamTriedAt = performance.now();
  stream = new EventSource(`${API}/events`);
  for (const kind of ["task", "device", "system"]) stream.addEventListener(kind, refreshSoon);
  stream.onopen = () => { tellLink(); if (failures) refreshIn(0); };
  stream.onerror = () => {
    if (stream && stream.readyState === EventSource.CLOSED) hangUp();
    tellLink();
    if (!failures) refreshSoon();  // is it the stream only, or the master?
  };
}
function hangUp() {
  if (stream) stream.close();
  stream = null;
}
document.addEventListener("visibilitychange", () => {
  if (document.hidden) { hangUp(); clearTimeout(timer); due = Infinity; } else if (!isSignedOut) { streamTriedAt = -Infinity; refreshIn(0); }
});
addEventListener("online", () => { if (!isSignedOut) refreshIn(0); });

// ---- Telling --------------------------------------------------------------------------------------------------------
function tellLink() {
  const name = isSignedOut ? "signed_out" : failures ? "offline" : !answeredAt ? "starting" : stream && stream.readyState === EventSource.OPEN ? "live" : "polling";
  byId("link").className = `link ${name}`;
  say(byId("link-text"), t(name));
}
function tellLoss(problem) {
  failures += 1;
  const text = problem.status ? t("unwell", { status: problem.status, detail: problem.message }) : answeredAt ? t("lost", { time: view.clock(answeredAt) }) : t("lost_first");
  say(byId("banner-text"), text);
  if (answeredAt) Object.assign(byId("banner-age").dataset, { at: view.now() - (Date.now() - answeredAt), key: "lost_for" });
  byId("banner").hidden = false;
  view.tick();
}
function draw() {
  byId("key").hidden = true;
  byId("board").hidden = !overview;
  byId("sign-out").hidden = memory.get("signed_in") !== "yes";
  tellLink();
  if (!overview) return;
  const needsKey = memory.get("signed_in") === "yes";
  view.showOverview(overview, filter);
  view.showDevices(devices, everyDevice);
  const isLoopback = /^(localhost|127\..*|\[::1\])$/.test(location.hostname);
  view.showAddDevice({ isOpen: isAdding, hasNone: devices.length === 0, hasFile: overview.has_worker_file, needsKey, url: location.origin, isLoopback });
  const submit = `curl ${location.origin}${API}/tasks -H "Content-Type: application/json"${needsKey ? ' -H "Authorization: Bearer YOUR_KEY"' : ""} -d '{"task_type": "echo", "task_data": {"say": "hello"}}'`;
  if (tasks) view.showTasks(tasks, filter, reasons, submit);
  if (taskId && (task || taskProblem)) view.showTask(task, taskProblem, filter, API);
}

// ---- The key --------------------------------------------------------------------------------------------------------
function askForKey() {
  if (!isSignedOut) { byId("key-input").value = ""; say(byId("key-error"), ""); }
  isSignedOut = true;
  hangUp();
  memory.set("signed_in", "no");
  byId("dialog").close();
  [overview, devices, tasks, task] = [null, null, null, null];
  for (const id of ["board", "banner", "sign-out"]) byId(id).hidden = true;
  say(byId("about"), "");
  byId("key").hidden = false;
  byId("key-input").focus();
}
byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await ask("/login", { key: byId("key-input").value });
    byId("key-input").value = "";
    memory.set("signed_in", "yes");
    isSignedOut = false;
    streamTriedAt = -Infinity;
    await refresh();
    openTask(true);
  } catch (problem) {
    say(byId("key-error"), problem.status === 401 || problem.status === 403 ? t("key_wrong") : problem.status ? problem.message : t("lost_first"));
    byId("key-input").select();
  }
});
byId("sign-out").addEventListener("click", async () => { await ask("/logout", {}).catch(() => {}); askForKey(); tellLink(); });

// ---- The address ----------------------------------------------------------------------------------------------------
function readAddress() {
  const query = new URLSearchParams(location.hash.slice(1));
  const before = JSON.stringify(filter);
  filter = Object.fromEntries(["status", "batch", "text"].map((name) => [name, query.get(name) || ""]).filter(([, value]) => value));
  if (JSON.stringify(filter) !== before) limit = PAGE_SIZE;
  for (const name of ["status", "batch", "text"]) {
    const field = byId("filter").elements[name];
    if (field !== document.activeElement || name === "status") field.value = filter[name] || "";
  }
  byId("clear").hidden = Object.keys(filter).length === 0;
  const wanted = query.get("task") || "";
  const isOther = wanted !== taskId;
  if (isOther) [taskId, task, taskProblem] = [wanted, null, ""];
  openTask(isOther);
  draw();
  if (!isSignedOut) refreshIn(0);
}
function openTask(isOther) {
  const dialog = byId("dialog");
  if (!taskId) { dialog.close(); return; }
  if (isSignedOut || (dialog.open && !isOther)) return;
  disarm();
  say(byId("dialog-said"), "");
  view.showTask(null, "", filter, API);
  say(byId("dialog-title"), `#${taskId}`);
  if (!dialog.open) dialog.showModal();
}
const go = (next) => { location.hash = view.address(next); };
let typing = 0;
byId("filter").addEventListener("input", (event) => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    history.replaceState(null, "", view.address({ ...Object.fromEntries(new FormData(byId("filter"))) }));
    readAddress();
  }, event.target.name === "status" ? 0 : 300);
});
byId("filter").addEventListener("submit", (event) => event.preventDefault());
byId("clear").addEventListener("click", () => { byId("filter").reset(); go({}); byId("filter").elements.text.focus(); });
addEventListener("hashchange", readAddress);
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.closest("input, select, dialog")) return;
  event.preventDefault();
  byId("filter").elements.text.focus();
});
byId("skip").addEventListener("click", (event) => { event.preventDefault(); byId("tasks").focus(); byId("tasks").scrollIntoView(); });
byId("more-tasks").firstChild.addEventListener("click", () => { limit = Math.min(LONGEST_PAGE, limit * 2); refreshIn(0); });
byId("add-device").addEventListener("click", () => { isAdding = !isAdding; draw(); });
byId("more-devices").firstChild.addEventListener("click", () => { everyDevice = true; draw(); });

// ---- One task -------------------------------------------------------------------------------------------------------
const cancel = byId("cancel"), requeue = byId("requeue");
let armed = 0;
function disarm() {
  clearTimeout(armed);
  armed = 0;
  cancel.classList.remove("armed");
  say(cancel, t("cancel"));
}
async function act(verb, done) {
  cancel.disabled = requeue.disabled = true;
  try {
    await ask(`/tasks/${encodeURIComponent(taskId)}/${verb}`, {});
    say(byId("dialog-said"), t(done));
  } catch (problem) {
    say(byId("dialog-said"), problem.status ? problem.message : t("lost_first"));
  } finally {
    cancel.disabled = requeue.disabled = false;
    refreshIn(0);
  }
}
cancel.addEventListener("click", () => {
  if (armed) { disarm(); act("cancel", "cancelled_now"); return; }
  armed = setTimeout(disarm, SURE_MS);
  cancel.classList.add("armed");
  say(cancel, t("cancel_sure"));
});
requeue.addEventListener("click", () => act("requeue", "requeued_now"));
byId("dialog-close").addEventListener("click", () => byId("dialog").close());
byId("dialog").addEventListener("close", () => {
  if (!taskId || isSignedOut) return;
  go(filter);
});
byId("dialog").addEventListener("click", (event) => { if (event.target === byId("dialog")) byId("dialog").close(); });

// ---- Language, copying, start ---------------------------------------------------------------------------------------
function speak() {
  view.useLanguage(language);
  const options = [["", t("all")], ...view.STATES.map((name) => [name, t(name)])];
  byId("filter").elements.status.replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === (filter.status || ""))));
  disarm();
  draw();
}
byId("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  memory.set("language", language);
  speak();
});
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = !navigator.clipboard;  // browsers offer it over HTTPS and on localhost only; the text selects as a whole
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent).catch(() => {});
    say(button, t("copied"));
    setTimeout(() => say(button, t("copy")), 1500);
  });
}
speak();
readAddress();
setInterval(() => { if (!document.hidden) view.tick(); }, 1000);
