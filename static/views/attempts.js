/* What became of each attempt? One line each on a common scale of time: how long it waited, was on its way, and ran; with its log. */
import { html, useState } from "../vendor/htm-preact.js";
import { now } from "../api.js";
import { Card, DeviceLink, Empty, Meter, Moment, Pill, tone, useTick } from "../parts.js";
import { clock, duration, has, percent, sentence, t } from "../text.js";

export const isOpen = (attempt) => ["assigned", "running"].includes(attempt.status);
const errorOf = (attempt) => [attempt.error_type && (has(`reason_${attempt.error_type}`) ? t(`reason_${attempt.error_type}`) : attempt.error_type), attempt.error_message].filter(Boolean).join(": ");

export function Attempts({ task }) {
  useTick();
  const attempts = [...(task.attempts || [])].sort((a, b) => a.id - b.id);
  if (!attempts.length) return html`<${Card}><${Empty}><p>${t("no_attempts")}</p></${Empty}></${Card}>`;
  const moments = attempts.map((attempt, i) => momentsOf(attempt, i ? attempts[i - 1] : null, task));
  const start = moments[0].waited, end = Math.max(...moments.map((one) => one.ended), start + 1);
  return html`<${Card} className="pad timeline"><p class="scale quiet" aria-hidden="true"><span>${clock(start)}</span><span>${t("in_all", { age: duration((end - start) / 1000, true) })}</span><span>${clock(end)}</span></p>
    <ol reversed>${attempts.map((attempt, i) => html`<${Attempt} key=${attempt.id} attempt=${attempt} at=${moments[i]} start=${start} span=${end - start} isNewest=${i === attempts.length - 1} />`).reverse()}</ol>
    <p class="legend quiet" aria-hidden="true"><span><i class="bar waited" />${t("part_waited")}</span><span><i class="bar sent" />${t("part_sent")}</span><span><i class="bar ran" />${t("part_ran")}</span></p></${Card}>`;
}
/** When it began to wait (after the attempt before it), was assigned, began to run, and ended; an open one ends now. */
function momentsOf(attempt, before, task) {
  const parse = (iso) => (iso ? Date.parse(iso) : null);
  const assigned = parse(attempt.assigned_at), ended = isOpen(attempt) ? Math.max(now(), assigned) : parse(attempt.completed_at) ?? assigned;
  const waited = Math.min(assigned, before ? parse(before.completed_at) ?? parse(before.assigned_at) : parse(task.created_at));
  return { waited, assigned, started: Math.min(parse(attempt.started_at) ?? ended, ended), ended };
}
function Attempt({ attempt, at, start, span, isNewest }) {
  const [isShown, show] = useState(isNewest);
  const parts = [["waited", at.waited, at.assigned], ["sent", at.assigned, at.started], ["ran", at.started, at.ended]];
  const place = (from, to) => (node) => {
    if (!node) return;
    node.style.setProperty("left", `${(100 * (from - start)) / span}%`);
    node.style.setProperty("width", `${(100 * (to - from)) / span}%`);
  };
  const took = (from, to) => duration((to - from) / 1000, true);
  const error = errorOf(attempt);
  return html`<li><details open=${isShown} onToggle=${(event) => show(event.currentTarget.open)}>
    <summary><${Pill} name=${attempt.status} /><span class="unseen">${t("attempt", { id: attempt.id })}</span><b>${attempt.device_id}</b>
      <span class="quiet">${[t("waited_for", { age: took(at.waited, at.assigned) }), attempt.started_at && t(isOpen(attempt) ? "running_for" : "ran_for", { age: took(at.started, at.ended) })].filter(Boolean).join(" · ")}</span>
      <span class="quiet"><${Moment} at=${attempt.started_at || attempt.assigned_at} /></span>
      <span class=${`track ${tone(attempt.status)}`} aria-hidden="true">${parts.map(([name, from, to]) => to > from && html`<i key=${name} class=${`bar ${name}`} ref=${place(from, to)} />`)}</span></summary>
    <div class="attempt">${isOpen(attempt) && html`<${Progress} attempt=${attempt} />`}
      ${error && html`<p class="note red">${error}</p>`}
      ${attempt.late_outcome && html`<p class="note amber">${sentence(t("late", { outcome: t(attempt.late_outcome) }))} <${Moment} at=${attempt.late_at} /></p>`}
      <p class="quiet">${t("attempt", { id: attempt.id })} · <${DeviceLink} id=${attempt.device_id} />${isOpen(attempt) && attempt.deadline_at && html` · ${t("deadline")} <${Moment} at=${attempt.deadline_at} />`}</p>
      ${attempt.log_tail ? html`<pre tabindex="0" aria-label=${t("log")}>${attempt.log_tail}</pre>` : html`<p class="quiet">${t("no_log")}</p>`}</div></details></li>`;
}
export const Progress = ({ attempt }) => (attempt.progress === null && !attempt.progress_message ? null : html`<div class="progress">
  <${Meter} part=${attempt.progress} label=${t("progress")} words=${[attempt.progress !== null && percent(attempt.progress), attempt.progress_message].filter(Boolean).join(" · ")} /></div>`);
