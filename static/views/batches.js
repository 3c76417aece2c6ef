/* How far is each batch, how fast does it go, and what failed in it? */
import { html, useState } from "../vendor/htm-preact.js";
import { useLive } from "../live.js";
import { act, Age, Card, CurlButton, Empty, goWith, link, Moment, Pages, Pill, ReasonDialog, Refusal, Section, STATES, Table, TaskLink, tone, Waiting } from "../parts.js";
import { may } from "../session.js";
import { duration, number, percent, t } from "../text.js";
import { actLong, BulkDialog } from "./bulk.js";
import { Export } from "./tasks.js";
import { TaskTable } from "./task_table.js";

const PILL = { open: "open", paused: "paused", cancelled: "cancelled" };
const batchPath = (name) => `/batches/${encodeURIComponent(name)}`;
const totalOf = (counts) => Object.values(counts).reduce((sum, n) => sum + n, 0);
const endedOf = (counts) => (counts.completed || 0) + (counts.failed || 0) + (counts.cancelled || 0);
const BatchPill = ({ state }) => html`<${Pill} name=${PILL[state] || state}>${t(`batch_${state}`)}</${Pill}>`;
/** "2.5 a second", or per minute where that is less than one. */
const speed = (rate) => (rate >= 1 ? t("a_second", { n: number(rate, 1) }) : t("a_minute", { n: number(rate * 60, 1) }));

/** The states of a batch as one bar, in the order of a task's life, with their numbers in words. */
function StackedBar({ counts, isBare = false }) {
  const shown = ["completed", "failed", "cancelled", "running", "assigned", "pending", "scheduled"].filter((name) => counts[name] > 0);
  return html`<span class="stack-bar" role="img" aria-label=${shown.map((name) => `${t(name)}: ${number(counts[name])}`).join(", ")}>${shown.map((name) => html`<i key=${name} class=${tone(name)} ref=${(node) => node && (node.style.flexGrow = counts[name])} />`)}</span>
    ${!isBare && html`<span class="small">${shown.map((name) => `${number(counts[name])} ${t(name)}`).join(" · ")}</span>`}`;
}

export function Batches({ values }) {
  const path = `/batches?${new URLSearchParams({ ...(values.name && { name: values.name }), ...(values.cursor && { cursor: values.cursor }) })}`.replace(/\?$/, "");
  const { data, problem } = useLive(path);
  const batches = data?.batches || [];
  return html`<${Section} title=${t("nav_batches")} aside=${html`<div><${CurlButton} path=${path} /></div>`}>
    <${NameFilter} key=${values.name || ""} name=${values.name || ""} />
    <${Refusal} problem=${problem} />
    ${!data ? !problem && html`<${Waiting} lines=${6} />` : batches.length > 0 ? html`<${Table} label=${t("nav_batches")} rows=${batches} keyOf=${(batch) => batch.name} columns=${[
      { name: "name", label: t("batch"), cell: (batch) => html`<a href=${link("batches", batch.name)}>${batch.name}</a>` },
      { name: "state", label: t("state"), cell: (batch) => html`<${BatchPill} state=${batch.state} />${batch.reason && html`<span class="small">${batch.reason}</span>`}` },
      { name: "counts", label: t("tasks_by_state"), cell: (batch) => html`<${StackedBar} counts=${batch.counts} />` },
      { name: "total", label: t("total"), cell: (batch) => number(totalOf(batch.counts)) },
      { name: "done", label: t("done_part"), cell: (batch) => percent(totalOf(batch.counts) ? endedOf(batch.counts) / totalOf(batch.counts) : null) },
      { name: "rate", label: t("rate"), cell: (batch) => (batch.rate_per_second ? speed(batch.rate_per_second) : "–") },
      { name: "created", label: t("created"), cell: (batch) => html`<${Moment} at=${batch.created_at} /><span class="small"><${Age} at=${batch.created_at} /></span>` }]} />`
      : html`<div class="card"><${Empty}><p>${t(values.name ? "no_batch_match" : "no_batches")}</p>${values.name ? html`<p><button type="button" class="plain" onClick=${() => goWith({ name: "" })}>${t("clear")}</button></p>` : may("submitter") && html`<p><a href=${link("new")}>${t("nav_new")}</a></p>`}</${Empty}></div>`}
    ${data && html`<${Pages} next=${data.next_cursor} cursor=${values.cursor} />`}</${Section}>`;
}
function NameFilter({ name }) {
  const [typed, type] = useState(name);
  const go = (event) => { event.preventDefault(); goWith({ name: typed.trim(), cursor: "" }); };
  return html`<form class="row" role="search" onSubmit=${go}><input type="search" name="name" value=${typed} maxLength="128" aria-label=${t("batch_name")} placeholder=${t("batch_name")} onInput=${(event) => type(event.target.value)} />
    <button type="submit" class="plain">${t("find")}</button>${name && html`<button type="button" class="plain" onClick=${() => goWith({ name: "", cursor: "" })}>${t("clear")}</button>`}</form>`;
}

export function Batch({ id }) {
  const path = batchPath(id);
  const { data: batch, problem } = useLive(path);
  if (problem && !batch) return html`<${Card} className="pad empty"><${Refusal} problem=${problem} /><p><a href=${link("batches")}>${t("nav_batches")}</a></p></${Card}>`;
  if (!batch) return html`<${Waiting} lines=${8} />`;
  const total = totalOf(batch.counts), ended = endedOf(batch.counts);
  return html`<${Section} title=${batch.name} aside=${html`<div><${Actions} batch=${batch} path=${path} /><${CurlButton} path=${path} /></div>`}>
      <div class="row"><${BatchPill} state=${batch.state} />${batch.reason && html`<span class="quiet">${batch.reason}</span>`}<span class="quiet">${t("created")} <${Moment} at=${batch.created_at} /></span></div>
      <${Card} className="pad batch-progress">
        <div><span>${percent(total ? ended / total : null, 1)} · ${t("of", { n: number(ended), limit: number(total) })}</span><${StackedBar} counts=${batch.counts} isBare=${true} /></div>
        <div class="figures"><div class="figure"><b>${batch.rate_per_second ? speed(batch.rate_per_second) : "–"}</b><span>${t("rate")}</span></div>
          <div class="figure"><b>${batch.eta_seconds ? t("about_left", { age: duration(batch.eta_seconds) }) : "–"}</b><span>${t("eta")}</span></div>
          <div class="figure"><b>${number(batch.completed_last_hour)}</b><span>${t("completed_last_hour")}</span></div>
          <div class="figure"><b>${number(batch.failed_last_hour)}</b><span>${t("failed_in_last_hour")}</span></div></div></${Card}>
      <ul class="states">${STATES.map((name) => html`<li key=${name} class=${batch.counts[name] ? "" : "zero"}><a href=${link("tasks", null, { batch: batch.name, status: name })}><${Pill} name=${name} /> <b>${number(batch.counts[name] || 0)}</b></a></li>`)}</ul></${Section}>
    <${Failures} batch=${batch} path=${`${path}/failures`} />
    <${Newest} name=${batch.name} />`;
}
function Actions({ batch, path }) {
  const [asking, ask] = useState(null);
  const change = (verb, reason = "") => act(`${path}/${verb}`, { body: reason ? { reason } : {}, done: t(`batch_${verb}_done`), undo: () => change(verb === "pause" ? "resume" : "pause") });
  const cancel = (reason) => actLong(`${path}/cancel`, reason ? { reason } : {}, ({ changed }) => t("batch_cancel_done", { n: number(changed) }));
  return may("operator") && html`${batch.state === "open" && html`<button type="button" class="plain" onClick=${() => ask("pause")}>${t("batch_pause")}</button>`}
    ${batch.state !== "open" && html`<button type="button" class="main" onClick=${() => change("resume")}>${t("batch_resume")}</button>`}
    ${batch.state !== "cancelled" && html`<button type="button" class="danger" onClick=${() => ask("cancel")}>${t("batch_cancel")}</button>`}
    ${asking && html`<${ReasonDialog} title=${t(`batch_${asking}_title`, { name: batch.name })} help=${t(`batch_${asking}_help`)} button=${t(`batch_${asking}_go`)} onReason=${(reason) => (asking === "pause" ? change("pause", reason) : cancel(reason))} onClose=${() => ask(null)} />`}`;
}
function Failures({ batch, path }) {
  const { data, problem } = useLive(batch.counts.failed ? path : null, 10000);
  const [again, setAgain] = useState(null);
  if (!batch.counts.failed) return null;
  const filterOf = (group) => ({ batch: batch.name, status: "failed", error: group.error_message });
  return html`<${Section} title=${t("failures")} aside=${html`<div>${may("operator") && html`<button type="button" class="plain" onClick=${() => setAgain({ batch: batch.name, status: "failed" })}>${t("requeue_all_failed")}</button>`}<${CurlButton} path=${path} /></div>`}>
    <${Refusal} problem=${problem} />
    ${data?.is_partial && html`<p class="note amber">${t("failures_partial")}</p>`}
    ${!data ? !problem && html`<${Waiting} />` : html`<${Table} label=${t("failures")} rows=${data.groups} keyOf=${(group) => `${group.error_type} ${group.error_message}`} columns=${[
      { name: "count", label: t("count"), cell: (group) => html`<b>${group.is_more ? t("at_least", { n: number(group.n) }) : number(group.n)}</b>` },
      { name: "error", label: t("error"), cell: (group) => html`<span class="message">${group.error_message || t("no_message")}</span>${group.error_type && html`<span class="small">${group.error_type}</span>`}` },
      { name: "example", label: t("newest_example"), cell: (group) => html`<${TaskLink} id=${group.task_id} />` },
      { name: "do", label: t("task_actions"), cell: (group) => group.error_message && html`<span class="row">${may("operator") && html`<button type="button" class="plain" onClick=${() => setAgain(filterOf(group))}>${t("requeue_group")}</button>`}
        <a href=${link("tasks", null, filterOf(group))}>${t("its_tasks")}</a></span>` }]} />`}
    ${again && html`<${BulkDialog} action="requeue" filter=${again} onClose=${() => setAgain(null)} />`}</${Section}>`;
}
function Newest({ name }) {
  const path = `/tasks?${new URLSearchParams({ batch: name, limit: 20 })}`;
  const { data } = useLive(path);
  return html`<${Section} title=${t("newest")} aside=${html`<div><a href=${link("tasks", null, { batch: name })}>${t("all_of_them")}</a><${Export} filter=${{ batch: name }} values=${{ include: "result" }} /><${CurlButton} path=${path} /></div>`}>
    ${data ? html`<${TaskTable} tasks=${data.tasks} label=${t("newest")} without=${["batch"]} />` : html`<${Waiting} />`}</${Section}>`;
}
