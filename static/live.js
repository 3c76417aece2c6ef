/* When is what asked again? Every answer on the page is one of these: asked when it appears, when an event says that
   something happened (at most once a second), and every few seconds anyway; not at all while the tab is hidden. */
import { useEffect, useState } from "./vendor/htm-preact.js";
import { API, ask, whenSessionEnds } from "./api.js";
import { know, session } from "./session.js";

export const SESSION = "/session";
const EVERY_MS = 5000, AFTER_EVENT_MS = 1000, STREAM_RETRY_MS = 15000, LONGEST_RETRY_MS = 3000, KEPT_MS = 60000;

const answers = new Map();   // path -> {data, problem, at, every, users: Set, dueAt, askedAt, isAsked}
const watchers = new Set();  // who wants to know how the connection is
export const connection = { state: "starting", lostAt: null, detail: "", answeredAt: null };
export let ended = "";  // why the session is over: the code of the refusal, "" where nobody was signed in or somebody left
let failures = 0, isSignedOut = false, isEntering = false, isDoubted = false, sessions = 0, timer = 0;

function become(state, detail = "") {
  if (connection.state === state && connection.detail === detail) return;
  connection.state = state;
  connection.detail = detail;
  if (state !== "offline") connection.lostAt = null;
  for (const tell of watchers) tell();
}
const stateNow = () => (isSignedOut ? "signed_out" : failures ? "offline" : connection.answeredAt === null ? "starting" : stream && stream.readyState === EventSource.OPEN ? "live" : "polling");

function entry(path) {
  if (!answers.has(path)) answers.set(path, { data: null, problem: null, at: null, every: EVERY_MS, users: new Set(), dueAt: 0, askedAt: -Infinity, isAsked: false, leftAt: performance.now() });
  return answers.get(path);
}

// ---- Asking: each question by itself, so that a slow one holds up no other -------------------------------------------
async function askOne(path, one, isProbe = false) {
  Object.assign(one, { isAsked: true, askedAt: performance.now(), dueAt: Infinity });
  const asker = sessions;
  let data = one.data, problem = null;
  try {
    data = await ask(path);
  } catch (error) {
    problem = error;
  }
  one.isAsked = false;
  one.dueAt = Math.min(one.dueAt, performance.now() + one.every);
  if (isSignedOut || asker !== sessions) return;  // it was an answer to somebody else
  if (problem?.status === 401) return;  // whether the session is over is found out below
  if (path === SESSION && data) {
    if (data.role) know(data); else if (!session().role) { signOut(); return; }
  }
  if (problem && !problem.isRefusal) { lose(problem, isProbe); return; }
  Object.assign(one, { data, problem, at: Date.now() });  // a refusal is of this question; the master itself is well
  if (failures) for (const other of answers.values()) if (other !== one) other.dueAt = 0;  // what they say is from before the loss
  failures = 0;
  connection.answeredAt = one.at;
  listen();
  become(stateNow());
  for (const tell of one.users) tell();
}
function lose(problem, isProbe) {
  failures = isProbe ? failures + 1 : Math.max(failures, 1);
  connection.lostAt ??= connection.answeredAt;
  become("offline", problem.status ? `${problem.status} ${problem.message.replace(/[.。]$/, "")}` : "");
}
/** Asks what is due. While nobody knows whether the master is there one question finds out; the others follow. */
async function round() {
  clearTimeout(timer);
  if (isSignedOut || document.hidden) return;
  const isUnknown = failures > 0 || connection.answeredAt === null, used = [...answers].filter(([, one]) => one.users.size);
  const due = used.filter(([, one]) => !one.isAsked && (isUnknown || one.dueAt <= performance.now() + 50));
  // Whoever is there may be told without the database, so where there is another question it is that one.
  if (isUnknown && due.length === used.length && due.length) { await askOne(...(due.find(([path]) => path !== SESSION) || due[0]), true); schedule(); }
  if (isUnknown) return;
  for (const [path, one] of due) askOne(path, one).finally(schedule);
  schedule();
  for (const [path, one] of answers) if (!one.users.size && performance.now() - one.leftAt > KEPT_MS) answers.delete(path);
}
function schedule() {
  clearTimeout(timer);
  if (isSignedOut || document.hidden) return;
  const next = Math.min(...[...answers.values()].filter((one) => one.users.size && !one.isAsked).map((one) => one.dueAt));
  if (failures) timer = setTimeout(round, Math.min(LONGEST_RETRY_MS, 500 * 2 ** failures));
  else if (next < Infinity) timer = setTimeout(round, Math.max(0, next - performance.now()));
}
/** Ask everything on the page again now; or, a second after it was asked last, what is not asked at a slower pace on purpose. */
export function soon(pause = AFTER_EVENT_MS) {
  for (const one of answers.values()) if (!pause || one.every <= EVERY_MS) one.dueAt = Math.min(one.dueAt, one.askedAt + pause);
  if (!pause) round(); else if (!failures) schedule();
}

// ---- The stream: one a tab, none while it is hidden, since a browser opens at most six connections to one master -----
let stream = null, streamTriedAt = -Infinity;
function listen() {
  if (stream || document.hidden || performance.now() - streamTriedAt < STREAM_RETRY_MS) return;
  streamTriedAt = performance.now();
  stream = new EventSource(`${API}/events`);
  for (const kind of ["task", "device", "batch", "system", "access"]) {
    stream.addEventListener(kind, () => soon());
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
whenSessionEnds(async (problem) => {
  if (isEntering || isSignedOut || isDoubted) return;
  isDoubted = true;
  const said = await ask(SESSION).catch(() => null);  // a question may have been on its way while somebody signed in
  isDoubted = false;
  if (said?.role) know(said); else if (said && !isEntering && !isSignedOut) signOut(problem.code);
});
/** Nothing that was answered stays. `why`: the code of a refusal; then the view waits for whoever signs in again. */
export function signOut(why = "") {
  isSignedOut = true;
  sessions += 1;
  ended = why;
  if (!why) know(null);
  hangUp();
  for (const one of answers.values()) Object.assign(one, { data: null, problem: null, dueAt: 0 });
  become("signed_out");
}
/** Who it is comes first: what the view asks and offers depends on it. */
export async function signedIn() {
  know(await ask(SESSION));
  isSignedOut = false;
  streamTriedAt = -Infinity;
  connection.answeredAt = null;
  become("starting");
  soon(0);
}
/** While `change` makes the master ask for keys and signs in with the first, a refusal in between ends nothing. */
export async function enterBy(change) {
  isEntering = true;
  try { return await change(); } finally { isEntering = false; soon(0); }
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
    if (!one.isAsked && (one.at === null || performance.now() >= one.dueAt)) { one.dueAt = 0; clearTimeout(timer); timer = setTimeout(round, 0); } else schedule();
    return () => { one.users.delete(tell); one.leftAt = performance.now(); };
  }, [path, every]);
  return one || { data: null, problem: null, at: null };
}
export function useConnection() {
  useRedraw(watchers);
  return connection;
}
