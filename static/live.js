/* When is what asked again? Every answer on the page is one of these: asked when it appears, when an event says that
   something happened (at most once a second), and every few seconds anyway; not at all while the tab is hidden. */
import { useEffect, useState } from "./vendor/htm-preact.js";
import { API, ask } from "./api.js";

const EVERY_MS = 5000, AFTER_EVENT_MS = 1000, STREAM_RETRY_MS = 15000, LONGEST_RETRY_MS = 3000, KEPT_MS = 60000;

const answers = new Map();   // path -> {data, problem, at, every, users: Set, dueAt}
const watchers = new Set();  // who wants to know how the connection is
const listeners = new Set(); // who wants every event
export const connection = { state: "starting", lostAt: null, detail: "", answeredAt: null };
let failures = 0, isSignedOut = false, isAsking = false, isStale = false, timer = 0, lastRound = -Infinity;

function become(state, detail = "") {
  if (connection.state === state && connection.detail === detail) return;
  connection.state = state;
  connection.detail = detail;
  if (state !== "offline") connection.lostAt = null;
  for (const tell of watchers) tell();
}
const stateNow = () => (isSignedOut ? "signed_out" : failures ? "offline" : connection.answeredAt === null ? "starting" : stream && stream.readyState === EventSource.OPEN ? "live" : "polling");

function entry(path) {
  if (!answers.has(path)) answers.set(path, { data: null, problem: null, at: null, every: EVERY_MS, users: new Set(), dueAt: 0, leftAt: 0 });
  return answers.get(path);
}

// ---- Asking ---------------------------------------------------------------------------------------------------------
async function askOne(path, one) {
  let data = null, problem = null;
  try {
    data = await ask(path);
  } catch (error) {
    if (!error.isRefusal) throw error;
    problem = error;  // this question was refused; the master itself is well
  }
  Object.assign(one, { data: problem ? one.data : data, problem, at: Date.now(), dueAt: performance.now() + one.every });
  for (const tell of one.users) tell();
}
async function round() {
  clearTimeout(timer);
  if (isAsking || isSignedOut || document.hidden) { isStale = isAsking; return; }
  isAsking = true;
  lastRound = performance.now();
  const due = [...answers].filter(([, one]) => one.users.size && one.dueAt <= lastRound + 50);
  try {
    // After a loss one question finds out whether the master is back; the others follow.
    if (due.length && (failures || connection.answeredAt === null)) { await askOne(...due[0]); due.shift(); }
    await Promise.all(due.map(([path, one]) => askOne(path, one)));
    failures = 0;
    connection.answeredAt = Date.now();
    listen();
    become(stateNow());
  } catch (problem) {
    if (problem.status === 401) { signOut(); return; }
    failures += 1;
    connection.lostAt ??= connection.answeredAt;
    become("offline", problem.status ? `${problem.status} ${problem.message}` : "");
  } finally {
    isAsking = false;
    for (const [path, one] of answers) if (!one.users.size && performance.now() - one.leftAt > KEPT_MS) answers.delete(path);
    if (isStale) { isStale = false; soon(0); } else schedule();
  }
}
function schedule() {
  clearTimeout(timer);
  if (isSignedOut || document.hidden) return;
  const next = Math.min(...[...answers.values()].filter((one) => one.users.size).map((one) => one.dueAt));
  if (failures) timer = setTimeout(round, Math.min(LONGEST_RETRY_MS, 500 * 2 ** failures));
  else if (next < Infinity) timer = setTimeout(round, Math.max(0, next - performance.now()));
}
/** Ask everything on the page again now; or, a second after the last time, what is not asked at a slower pace on purpose. */
export function soon(pause = AFTER_EVENT_MS) {
  for (const one of answers.values()) if (!pause || one.every <= EVERY_MS) one.dueAt = Math.min(one.dueAt, lastRound + pause);
  if (!failures || !pause) { clearTimeout(timer); timer = setTimeout(round, Math.max(0, lastRound + pause - performance.now())); }
}

// ---- The stream: one a tab, none while it is hidden, since a browser opens at most six connections to one master -----
let stream = null, streamTriedAt = -Infinity;
function listen() {
  if (stream || document.hidden || performance.now() - streamTriedAt < STREAM_RETRY_MS) return;
  streamTriedAt = performance.now();
  stream = new EventSource(`${API}/events`);
  for (const kind of ["task", "device", "batch", "system", "access"]) {
    stream.addEventListener(kind, (event) => {
      soon();
      const told = { id: Number(event.lastEventId), kind, at: new Date().toISOString(), facts: JSON.parse(event.data) };
      for (const tell of listeners) tell(told);
    });
  }
  stream.onopen = () => { if (failures) soon(0); become(stateNow()); };
  stream.onerror = () => {
    if (stream && stream.readyState === EventSource.CLOSED) hangUp();
    if (!failures) { soon(); become(stateNow()); }
  };
}
function hangUp() {
  if (stream) stream.close();
  stream = null;
}
document.addEventListener("visibilitychange", () => {
  if (document.hidden) { hangUp(); clearTimeout(timer); } else { streamTriedAt = -Infinity; soon(0); }
});
addEventListener("online", () => soon(0));

// ---- Signing in and out ---------------------------------------------------------------------------------------------
export function signOut() {
  isSignedOut = true;
  hangUp();
  for (const one of answers.values()) Object.assign(one, { data: null, problem: null, dueAt: 0 });
  become("signed_out");
}
export function signedIn() {
  isSignedOut = false;
  streamTriedAt = -Infinity;
  connection.answeredAt = null;
  become("starting");
  soon(0);
}

// ---- Hooks ----------------------------------------------------------------------------------------------------------
function useRedraw(set) {
  const [, redraw] = useState(0);
  useEffect(() => {
    const tell = () => redraw((n) => n + 1);
    set.add(tell);
    return () => set.delete(tell);
  }, [set]);
}
/** {data, problem, at}: the newest answer to a GET, the one before while a new one is on its way. `path` may be null. */
export function useLive(path, every = EVERY_MS) {
  const one = path === null ? null : entry(path);
  const [, redraw] = useState(0);
  useEffect(() => {
    if (!one) return undefined;
    const tell = () => redraw((n) => n + 1);
    one.every = every;
    one.users.add(tell);
    if (one.at === null || performance.now() >= one.dueAt) { one.dueAt = 0; clearTimeout(timer); timer = setTimeout(round, 0); } else schedule();
    return () => { one.users.delete(tell); one.leftAt = performance.now(); };
  }, [path, every]);
  return one || { data: null, problem: null, at: null };
}
export function useConnection() {
  useRedraw(watchers);
  return connection;
}
/** Calls `tell({id, kind, at, facts})` for every event while the view is there. */
export function useEvents(tell) {
  useEffect(() => { listeners.add(tell); return () => listeners.delete(tell); }, []);
}
