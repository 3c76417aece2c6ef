/* What does one row say of a task? What it is about, and the one line that tells its error, why it waits, or when it comes again. */
import { html, useRef } from "../vendor/htm-preact.js";
import { useLive } from "../live.js";
import { Age, BatchLink, DeviceLink, link, Moment, Pill, Table } from "../parts.js";
import { clock, duration, has, number, t, why } from "../text.js";

export const WHY_MS = 10000;  // a walk over all devices: events do not hurry it
export const LANES_ASKED = 10;  // so many lanes of one page are asked why they wait

export const dates = (task) => [task.start_date, task.end_date].filter(Boolean).join(" – ");
function subject(task) {
  const key = task.unique_key && !task.unique_key.startsWith("content-") ? task.unique_key : "";
  return [task.username, task.app_id, dates(task)].filter(Boolean).join(" · ") || key;
}
/** Why it ended, where the state alone does not say it. */
export const ended = (task) => (has(`reason_${task.end_reason}`) ? t(`reason_${task.end_reason}`) : "");
/** [text, tone]; `waiting` is the answer of /why, of this task or of another one in its lane. */
export function remark(task, waiting) {
  const last = task.error_message ? t("last_error", { error: task.error_message }) : "";
  if (task.status === "failed") return [[ended(task), task.error_message].filter(Boolean).join(": "), "red"];
  if (task.status === "cancelled") return [task.error_message || "", ""];
  if (task.status === "scheduled") return [[task.next_run_at && t(task.attempt_count ? "again" : "due", { time: clock(task.next_run_at) }), last].filter(Boolean).join(" · "), "violet"];
  if (task.status === "pending") return [[waiting && why(waiting), last].filter(Boolean).join(" · "), "amber"];
  return ["", ""];
}
function Since({ task }) {
  if (task.status === "pending") return html`<${Age} at=${task.updated_at || task.created_at} words="waiting" />`;
  if (task.status === "running" && task.started_at) return html`<${Age} at=${task.started_at} words="running_for" />`;
  if (task.status === "assigned") return html`<${Age} at=${task.updated_at} words="sent" />`;
  if (task.started_at && task.finished_at) return t("took", { age: duration((Date.parse(task.finished_at) - Date.parse(task.started_at)) / 1000, true) });
  return "";
}

/** Tasks of one lane wait for the same reason, so one question answers for all of them: that about the oldest on the page. */
const laneOf = (task) => (task.lane_id ? `lane ${task.lane_id}` : `task ${task.id}`);
function useOldestOfLanes(tasks) {
  const held = useRef(new Map());  // where tasks come and go quickly, another one is oldest each second: one is asked for a while
  const oldest = new Map(), at = performance.now();
  for (const task of tasks) if (task.status === "pending") oldest.set(laneOf(task), task.id);
  for (const [lane, { until }] of held.current) if (until <= at) held.current.delete(lane);
  return new Map([...oldest].slice(0, LANES_ASKED).map(([lane, id]) => {
    if (!held.current.has(lane)) held.current.set(lane, { id, until: at + WHY_MS });
    return [lane, held.current.get(lane).id];
  }));
}
function Remark({ task, asked }) {
  const known = useRef(null);
  const { data } = useLive(task.status === "pending" && asked ? `/tasks/${asked}/why` : null, WHY_MS);
  if (data?.status === "pending") known.current = data;
  const [text, tone] = remark(task, known.current);
  return text ? html`<span class=${`remark small ${tone && `${tone}-text`}`} title=${text}>${text}</span>` : null;
}

/** `without`: columns that the view says elsewhere; `first`: a column of the view's own. */
export function TaskTable({ tasks, label, without = [], first = null, chosen }) {
  const oldest = useOldestOfLanes(tasks);
  const columns = [
    first,
    { name: "state", label: t("state"), cell: (task) => html`<${Pill} name=${task.status} />` },
    { name: "id", label: t("task"), cell: (task) => html`<a href=${link("tasks", task.id)} aria-label=${`${t("task_number", { id: task.id })}, ${task.task_type}, ${t(task.status)}`}>#${task.id}</a><span class="small">${task.task_type}</span>` },
    { name: "about", label: t("about_task"), cell: (task) => html`<span class="subject">${subject(task) || (without.includes("batch") ? "–" : "")}${!without.includes("batch") && task.batch && html`${subject(task) && " · "}<${BatchLink} name=${task.batch} />`}</span>
      <${Remark} task=${task} asked=${oldest.get(laneOf(task))} />${task.isGone && html`<span class="small">${t("no_longer_matches")}</span>`}` },
    { name: "device", label: t("device"), cell: (task) => html`<${DeviceLink} id=${task.assigned_device_id} />` },
    { name: "attempts", label: t("attempts"), cell: (task) => (task.attempt_count ? number(task.attempt_count) : "–") },
    { name: "created", label: t("created"), cell: (task) => html`<${Moment} at=${task.created_at} /><span class="small"><${Since} task=${task} /></span>` },
  ];
  return html`<${Table} label=${label} rows=${tasks} keyOf=${(task) => task.id} chosen=${chosen} columns=${columns.filter((column) => column && !without.includes(column.name))} />`;
}
