/* Where is a task in its life? The states and arrows as the master gives them, with the way that this task went. */
import { html, useEffect, useState } from "../vendor/htm-preact.js";
import { ask } from "../api.js";
import { Moment, Pill, tone } from "../parts.js";
import { has, t } from "../text.js";

const WIDE = { width: 780, height: 250, submit: [14, 130], scheduled: [300, 30], pending: [130, 130], assigned: [320, 130], running: [510, 130], completed: [705, 130], failed: [620, 30], cancelled: [400, 226] };
const TALL = { width: 340, height: 440, submit: [80, 12], scheduled: [262, 120], pending: [80, 80], assigned: [80, 190], running: [80, 300], completed: [80, 412], failed: [262, 356], cancelled: [262, 236] };
const HALF = [52, 17];
const SHOWN_STEPS = 14;
/** The first source of these is the usual one; the others (a report that came late) are drawn only where a task went that way. */
const MOSTLY_FROM_ONE = ["start", "complete", "fail", "snooze"];

let asked = null;  // the states of a release do not change while a page is open
function useTransitions() {
  const [known, set] = useState(null);
  useEffect(() => {
    asked ||= ask("/system").then((system) => system.transitions || [], () => { asked = null; return []; });
    asked.then(set);
  }, []);
  return known;
}
function useIsNarrow() {
  const media = matchMedia("(max-width: 40rem)");
  const [isNarrow, set] = useState(media.matches);
  useEffect(() => {
    const look = () => set(media.matches);
    media.addEventListener("change", look);
    return () => media.removeEventListener("change", look);
  }, []);
  return isNarrow;
}

/** [{from, to, at, device?}]: the way as far as the attempts tell it; the master keeps the newest twenty. */
function lifeOf(task) {
  const attempts = [...(task.attempts || [])].sort((a, b) => a.id - b.id);
  const steps = [];
  let state = "submit";
  const go = (to, at, device = null) => { if (to !== state) { steps.push({ from: state, to, at, device }); state = to; } };
  if (!attempts.length && task.status === "scheduled") go("scheduled", task.created_at);
  else go("pending", task.created_at);
  attempts.forEach((attempt, i) => {
    if (i) go("pending", null);
    go("assigned", attempt.assigned_at, attempt.device_id);
    if (attempt.started_at) go("running", attempt.started_at);
    const isLast = i === attempts.length - 1;
    if (attempt.status === "completed") go("completed", attempt.completed_at);
    else if (attempt.status === "released") go("pending", attempt.completed_at);
    else if (attempt.status === "cancelled") go("cancelled", attempt.completed_at);
    else if (["failed", "timeout", "snoozed"].includes(attempt.status)) go(isLast && task.status === "failed" ? "failed" : "scheduled", attempt.completed_at);
    if (attempt.late_outcome === "completed") go("completed", attempt.late_at);
  });
  if (state === "scheduled" && ["pending", "assigned", "running"].includes(task.status)) go("pending", null);
  go(task.status, task.finished_at && ["completed", "failed", "cancelled"].includes(task.status) ? task.finished_at : task.updated_at);
  return steps;
}

export function StateMachine({ task }) {
  const transitions = useTransitions(), isNarrow = useIsNarrow();
  const steps = lifeOf(task);
  const layout = isNarrow ? TALL : WIDE;
  const taken = new Set(steps.map((step) => `${step.from} ${step.to}`)), been = new Set(steps.map((step) => step.to));
  const arrows = new Map();  // "from to" -> verbs
  for (const { verb, from, to } of transitions || []) {
    const all = [from ?? []].flat(), sources = all.filter((source, i) => !i || !MOSTLY_FROM_ONE.includes(verb) || [to].flat().some((target) => taken.has(`${source} ${target}`)));
    for (const source of sources.length ? sources : ["submit"]) for (const target of [to].flat()) arrows.set(`${source} ${target}`, [...(arrows.get(`${source} ${target}`) || []), verb]);
  }
  for (const key of taken) if (!arrows.has(key)) arrows.set(key, []);
  const drawn = [...arrows].map(([key, verbs]) => ({ key, verbs, isTaken: taken.has(key), path: arrow(layout, ...key.split(" ")) })).filter((one) => one.path).sort((a, b) => a.isTaken - b.isTaken);
  const cut = steps.length > SHOWN_STEPS ? steps.slice(-SHOWN_STEPS) : steps;
  return html`<div class="card pad machine">
    ${transitions?.length > 0 && html`<svg viewBox=${`0 0 ${layout.width} ${layout.height}`} role="img" aria-label=${t("life_label", { state: t(task.status) })}>
      <defs>${["idle", "taken"].map((name) => html`<marker key=${name} id=${`tip-${name}`} class=${name} viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 8 4 0 8z" /></marker>`)}</defs>
      ${drawn.map((one) => html`<path key=${one.key} class=${one.isTaken ? "arrow taken" : "arrow idle"} d=${one.path} marker-end=${`url(#tip-${one.isTaken ? "taken" : "idle"})`}><title>${one.verbs.map((verb) => (has(`verb_${verb}`) ? t(`verb_${verb}`) : verb)).join(", ")}</title></path>`)}
      <circle cx=${layout.submit[0]} cy=${layout.submit[1]} r="5" class="start" />
      ${Object.keys(layout).filter((name) => Array.isArray(layout[name]) && name !== "submit").map((name) => html`<g key=${name} class=${`node ${tone(name)} ${name === task.status ? "now" : been.has(name) ? "been" : ""}`} transform=${`translate(${layout[name].join(" ")})`}>
        <rect x=${-HALF[0]} y=${-HALF[1]} width=${2 * HALF[0]} height=${2 * HALF[1]} rx="17" /><text text-anchor="middle" dy=".35em">${t(name)}</text></g>`)}
    </svg>`}
    <ol class="way" aria-label=${t("life_steps")}>${cut.length < steps.length && html`<li class="quiet">…</li>`}
      ${cut.map((step, i) => html`<li key=${i} aria-current=${i === cut.length - 1 ? "step" : null}><${Pill} name=${step.to} /> ${step.at && html`<span class="quiet"><${Moment} at=${step.at} />${step.device && ` · ${step.device}`}</span>`}</li>`)}</ol></div>`;
}

/** A curve from state to state that ends at the border of the second: there and back do not lie on each other. */
function arrow(layout, from, to) {
  const a = layout[from], b = layout[to];
  if (!a || !b || from === "width" || from === "height") return null;
  const [dx, dy] = [b[0] - a[0], b[1] - a[1]], length = Math.hypot(dx, dy);
  const isLong = length > 1.35 * (layout === WIDE ? 190 : 110) && (Math.abs(dx) < 1 || Math.abs(dy) < 1);
  const bend = from === "submit" ? 0 : isLong ? (layout === WIDE ? 0.26 * length : 0.42 * length) : 0.1 * length;
  const c = [(a[0] + b[0]) / 2 + (dy / length) * bend, (a[1] + b[1]) / 2 - (dx / length) * bend];
  const at = (x) => [0, 1].map((i) => (1 - x) ** 2 * a[i] + 2 * x * (1 - x) * c[i] + x ** 2 * b[i]);
  const isInside = ([x, y], [cx, cy]) => Math.abs(x - cx) < HALF[0] + 1 && Math.abs(y - cy) < HALF[1] + 1;
  let end = 1;
  while (end > 0.3 && isInside(at(end), b)) end -= 0.01;
  const control = [0, 1].map((i) => a[i] + (c[i] - a[i]) * end);
  return `M${a.map((n) => n.toFixed(1)).join(" ")}Q${control.map((n) => n.toFixed(1)).join(" ")} ${at(end).map((n) => n.toFixed(1)).join(" ")}`;
}
