/* What happened to this task, how does it stand, and what can be done with it? */
import { html } from "../vendor/htm-preact.js";
import { API } from "../api.js";
import { useLive } from "../live.js";
import { act, BatchLink, Card, CurlButton, DeviceLink, Facts, HELD, Json, link, Meter, Moment, OPEN, Pill, Refusal, Section, SureButton, Table, TaskLink, Waiting } from "../parts.js";
import { may } from "../session.js";
import { bytes, duration, number, sentence, t, why } from "../text.js";
import { Attempts, isOpen, Progress } from "./attempts.js";
import { StateMachine } from "./state_machine.js";
import { dates, ended, remark, TaskTable, WHY_MS } from "./task_table.js";

const DEVICES_SHOWN = 50;

export function Task({ id }) {
  const path = `/tasks/${encodeURIComponent(id)}`;
  const { data: task, problem } = useLive(path);
  if (problem) return html`<${Card} className="pad empty"><${Refusal} problem=${[404, 410].includes(problem.status) ? { message: t("not_found", { id }) } : problem} /><p><a href=${link("tasks")}>${t("nav_tasks")}</a></p></${Card}>`;
  if (!task) return html`<${Waiting} lines=${8} />`;
  const running = HELD.includes(task.status) && (task.attempts || []).find(isOpen);
  const hasResult = task.result !== null && task.result !== undefined, hasData = Object.keys(task.task_data || {}).length > 0, hasMore = hasResult || hasData || task.artifacts?.length > 0;
  return html`<${Section} title=${html`#${task.id} · ${task.task_type}`} className="task" aside=${html`<div><${Actions} task=${task} path=${path} /><${CurlButton} path=${path} /></div>`}>
      <div class="row"><${Pill} name=${task.status} /><${Standing} task=${task} /></div>
      ${running && html`<${Card} className="pad"><${Progress} attempt=${running} /></${Card}>`}</${Section}>
    ${["pending", "scheduled"].includes(task.status) && html`<${Why} key=${task.status} task=${task} path=${`${path}/why`} />`}
    <${Section} title=${t("life")}><${StateMachine} task=${task} /></${Section}>
    <${Section} title=${t("attempts")}><${Attempts} task=${task} /></${Section}>
    <div class=${hasMore ? "two" : "stack"}><${Section} title=${t("facts")}><${Card} className="pad"><${TaskFacts} task=${task} /></${Card}></${Section}>
      ${hasMore && html`<div class="stack">${hasResult && html`<${Section} title=${t("result")}><${Json} value=${task.result} /></${Section}>`}
        <${Files} task=${task} />
        ${hasData && html`<${Section} title=${t("task_data")}><${Json} value=${task.task_data} /></${Section}>`}</div>`}</div>
    ${task.children_count > 0 && html`<${Children} task=${task} />`}
    <p><a href=${`${API}${path}`}>${t("raw")}</a></p>`;
}

/** The sentence under the title: an error as it was written, or why it waits. */
function Standing({ task }) {
  if (task.status === "pending") return task.error_message && html`<p class="quiet">${t("last_error", { error: task.error_message })}</p>`;
  if (task.status === "scheduled") return html`<p class="note violet" id="standing">${remark(task, null)[0]}</p>`;
  const error = [ended(task), task.error_message].filter(Boolean).join(": ");
  return error && html`<p class=${`note ${task.status === "failed" ? "red" : "gray"}`} id="standing">${error}</p>`;
}
function Actions({ task, path }) {
  const cancel = () => act(`${path}/cancel`, { done: t("cancelled_now"), undo: requeue });
  const requeue = () => act(`${path}/requeue`, { done: t("requeued_now"), undo: cancel });
  return html`${may("operator") && OPEN.includes(task.status) && html`<${SureButton} key="cancel" onSure=${cancel} sure=${t("cancel_sure")}>${t("cancel")}</${SureButton}>`}
    ${may("operator") && ["failed", "cancelled"].includes(task.status) && html`<button key="requeue" type="button" class="main" onClick=${requeue}>${t("requeue")}</button>`}
    ${may("submitter") && html`<a class="button plain" href=${link("new", null, { from: task.id })}>${t("requeue_edited")}</a>`}`;
}
function TaskFacts({ task }) {
  const moment = (at) => at && html`<${Moment} at=${at} />`;
  const isWaiting = ["scheduled", "pending"].includes(task.status);
  return html`<${Facts} facts=${[
    [t("username"), task.username], [t("app_id"), task.app_id], [t("dates"), dates(task)], [t("batch"), task.batch && html`<${BatchLink} name=${task.batch} />`], [t("unique_key"), task.unique_key], [t("priority"), number(task.priority)],
    [t("device"), task.assigned_device_id && html`<${DeviceLink} id=${task.assigned_device_id} />`], [t("pinned"), task.pinned_device_id], [t("prefers"), task.prefer_device_id], [t("same_device_as"), task.same_device_as], [t("tags"), (task.required_tags || []).join(", ")],
    [t("created"), moment(task.created_at)], [t("started"), moment(task.started_at)], [t("finished"), moment(task.finished_at)], [t("next_run"), task.status === "scheduled" && moment(task.next_run_at)], [t("gives_up"), isWaiting && moment(task.give_up_at)],
    [t("retries"), t("of", { n: number(task.retry_count), limit: number(task.max_retry_count) })], [t("losses"), task.lost_count || ""], [t("snoozes"), task.snooze_count || ""], [t("timeout_seconds"), task.execution_timeout_seconds && duration(task.execution_timeout_seconds)],
    [t("parent"), task.parent_id && html`<${TaskLink} id=${task.parent_id} />`], [t("children"), task.children_count > 0 && html`<a href=${link("tasks", null, { parent_id: task.id })}>${number(task.children_count)}</a>`], [t("created_by"), task.created_by],
  ]} />`;
}

function Why({ task, path }) {
  const { data } = useLive(path, WHY_MS);
  const devices = data?.devices || [], isScheduled = task.status === "scheduled";
  if (isScheduled && !data?.limit) return null;  // the sentence under the title says all
  return html`<${Section} title=${t("why_waiting")} aside=${html`<div><${CurlButton} path=${path} /></div>`}>
    <p class=${`note ${isScheduled ? "violet" : "amber"}`} id="why">${isScheduled ? t("also_held") : data ? why(data) : task.waiting && why(task.waiting)}</p>
    ${data?.detail && why(data) !== sentence(data.detail) && html`<p class="quiet">${data.detail}</p>`}
    ${data?.limit && html`<${Card} className="pad"><${Limit} limit=${data.limit} /></${Card}>`}
    ${data && html`<p class="quiet">${data.next_look_seconds === null || data.next_look_seconds === undefined ? data.limit && t("next_look_when_ends") : t(isScheduled ? "due_in" : "next_look", { age: duration(Math.max(1, data.next_look_seconds)) })}</p>`}
    ${devices.length > 0 && html`<${Table} label=${t("each_device")} rows=${devices.slice(0, DEVICES_SHOWN)} keyOf=${(one) => one.device_id} columns=${[
      { name: "device", label: t("device"), cell: (one) => html`<${DeviceLink} id=${one.device_id} />` },
      { name: "because", label: t("each_device"), cell: (one) => one.excluded_because || t("nothing_against") }]} />`}
    ${devices.length > DEVICES_SHOWN && html`<p class="quiet">${t("more_devices_excluded", { n: number(devices.length - DEVICES_SHOWN) })}</p>`}
  </${Section}>`;
}
function Limit({ limit }) {
  const meters = [["running", limit.running, limit.max_running, "limit_running_now"], ["starts", limit.starts_in_window, limit.max_starts, "limit_starts_window"], ["day", limit.starts_today, limit.max_starts_per_day, "limit_starts_day"]];
  return html`<p><a href=${link("dispatch")}><b>${limit.name}</b></a> ${(limit.value || []).join(", ")}${limit.closed_until && html` · ${t("limit_closed_until")} <${Moment} at=${limit.closed_until} />`}</p>
    <div class="meters">${meters.filter(([, , most]) => most).map(([name, used, most, words]) => html`<${Meter} key=${name} part=${(used || 0) / most} label=${limit.name} level=${used >= most ? "amber" : ""} words=${t(words, { n: number(used || 0), limit: number(most), age: duration(limit.window_seconds || 0) })} />`)}</div>`;
}
function Files({ task }) {
  const files = task.artifacts || [];
  return files.length > 0 && html`<${Section} title=${t("files")} className="files"><${Card} className="pad"><ul>${files.map((file) => html`<li key=${file.artifact_id}>
    <a href=${`${API}/tasks/${task.id}/artifacts/${file.artifact_id}`} download=${file.name} title=${`sha256 ${file.sha256}`}>${file.name}</a>${" "}
    <span class="quiet">${[bytes(file.bytes), file.assignment_id !== task.assignment_id && t("attempt", { id: file.assignment_id })].filter(Boolean).join(" · ")}</span></li>`)}</ul></${Card}></${Section}>`;
}
function Children({ task }) {
  const path = `/tasks?parent_id=${task.id}&limit=20`;
  const { data } = useLive(path);
  return html`<${Section} title=${t("children_of", { n: number(task.children_count) })} aside=${html`<div><a href=${link("tasks", null, { parent_id: task.id })}>${t("all_of_them")}</a><${CurlButton} path=${path} /></div>`}>
    ${data ? html`<${TaskTable} tasks=${data.tasks} label=${t("children")} />` : html`<${Waiting} />`}</${Section}>`;
}
