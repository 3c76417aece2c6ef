/* How does the page ask the master? Public API only; the key stays in a cookie that scripts cannot read. */
import { session } from "./session.js";

export const API = "/api/distribution";
const PATIENCE_MS = 10000;

/** An answer that is none: `status` 0 when nobody answered; `code`, `field` and `detail` as the master wrote them. */
export class Problem extends Error {
  constructor(status, detail, { code = "", field = null } = {}) { super(detail); Object.assign(this, { status, code, field }); }
  /** It is about this question; the master itself is well. */
  get isRefusal() { return this.status >= 400 && this.status <= 500 && ![401, 408, 429].includes(this.status); }
}

let end = () => {};
/** Calls `tell` with the problem of each question that was refused because nobody is signed in any more. */
export function whenSessionEnds(tell) { end = tell; }

let skew = 0;
/** The master's time in milliseconds: the viewer's clock may be wrong. */
export const now = () => Date.now() + skew;
function setMasterClock(date) {
  const offset = Date.parse(date) - Date.now();
  skew = Math.abs(offset) > 2000 ? offset : 0;  // the Date header counts whole seconds
}

/** The JSON of an answer. Raises Problem. */
export async function ask(path, { method = "GET", body, signal } = {}) {
  const options = { method, headers: { Accept: "application/json" }, credentials: "same-origin", cache: "no-store", signal: signal || AbortSignal.timeout(PATIENCE_MS) };
  if (body !== undefined) { options.body = JSON.stringify(body); options.headers["Content-Type"] = "application/json"; }
  let response, answer;
  try {
    response = await fetch(API + path, options);
    answer = response.status === 204 ? null : await response.json();
  } catch (error) {
    if (response && !response.ok) throw new Problem(response.status, response.statusText);
    throw new Problem(0, String(error.message || error));
  }
  if (response.headers.get("Date")) setMasterClock(response.headers.get("Date"));
  if (response.ok) return answer;
  const problem = new Problem(response.status, answer.detail || answer.title || response.statusText, answer);
  if (response.status === 401 && path !== "/login") end(problem);
  throw problem;
}

/** "?a=1&b=2" of what is set, or "". */
export function query(values) {
  const text = new URLSearchParams(Object.entries(values).filter(([, value]) => value !== "" && value !== null && value !== undefined && value !== false)).toString();
  return text && `?${text}`;
}

/** The same question for a terminal. The key is never in it. */
export function curl(path, { method = "GET", body } = {}) {
  const quoted = (text) => `'${text.replace(/'/g, "'\\''")}'`;
  return ["curl", method === "GET" ? "" : `-X ${method}`, quoted(`${location.origin}${API}${path}`), session().key_needed ? '-H "Authorization: Bearer YOUR_KEY"' : "",
    body === undefined ? "" : `-H "Content-Type: application/json" -d ${quoted(JSON.stringify(body))}`].filter(Boolean).join(" ");
}
