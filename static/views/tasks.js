/* Which tasks are there? The address holds the filter and the page; a page costs the master the same with a thousand tasks and a million. */
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { API, query } from "../api.js";
import { useLive } from "../live.js";
import { CurlButton, Empty, goWith, Icon, Pages, Refusal, Section, STATES, tone, Waiting } from "../parts.js";
import { may } from "../session.js";
import { number, t } from "../text.js";
import { actOnEach, BulkDialog } from "./bulk.js";
import { FirstTask } from "./first_steps.js";
import { TaskTable } from "./task_table.js";

const MORE = ["task_type", "device_id", "batch", "username", "app_id", "error", "parent_id", "created_after", "created_before"];
const FILTERS = ["status", "text", ...MORE];
const PAUSE_MS = 300;

export const filterOf = (values) => Object.fromEntries(FILTERS.filter((name) => values[name]).map((name) => [name, values[name]]));

export function Tasks({ values }) {
  const filter = filterOf(values), isFiltered = Object.keys(filter).length > 0;
  const path = `/tasks${query({ ...filter, cursor: values.cursor })}`;
  const { data, problem } = useLatest(path);
  const [chosen, choose] = useState(new Set());
  useEffect(() => choose(new Set()), [path]);
  const [bulk, openBulk] = useState(null);
  const { tasks, newer, hold } = useSteady(data?.tasks || [], path);
  return html`<${Section} title=${t("nav_tasks")} className="tasks" aside=${html`<div><${Export} filter=${filter} /><${CurlButton} path=${path} /></div>`}>
    <${Filter} filter=${filter} isFiltered=${isFiltered} />
    <div class="row doing">${chosen.size ? html`<b>${t("chosen", { n: number(chosen.size) })}</b>
        <button type="button" class="danger" onClick=${() => { actOnEach([...chosen], "cancel"); choose(new Set()); }}>${t("cancel_these")}</button>
        <button type="button" class="plain" onClick=${() => { actOnEach([...chosen], "requeue"); choose(new Set()); }}>${t("requeue_these")}</button>
        <button type="button" class="plain" onClick=${() => choose(new Set())}>${t("choose_none")}</button>`
      : tasks.length > 0 && may("operator") && html`<span class="quiet">${t(isFiltered ? "all_matching" : "all_tasks_listed")}</span>
        <button type="button" class="plain" onClick=${() => openBulk("cancel")}>${t("bulk_cancel")}</button>
        <button type="button" class="plain" onClick=${() => openBulk("requeue")}>${t("bulk_requeue")}</button>`}
      <span class="quiet newer" role="status">${newer > 0 && t("newer", { n: number(newer) })}</span></div>
    <${Refusal} problem=${problem} />
    ${!data ? !problem && html`<${Waiting} lines=${8} />` : tasks.length > 0 ? html`<div onPointerEnter=${hold(true)} onPointerLeave=${hold(false)}>
        <${TaskTable} tasks=${tasks} label=${t("nav_tasks")} chosen=${(task) => chosen.has(task.id)} first=${may("operator") && checks(tasks, chosen, choose)} /></div>`
      : data.partial || values.cursor ? null : !problem && html`<div class="card">${isFiltered ? html`<${Empty}><p>${t("no_match")}</p><p><button type="button" class="plain" onClick=${clear}>${t("clear")}</button></p></${Empty}>` : html`<${FirstTask} />`}</div>`}
    ${data?.partial && html`<p class="note amber" role="status">${t("partial")}</p>`}
    ${data && !tasks.length && values.cursor && !data.partial && html`<p class="quiet">${t("no_more")}</p>`}
    ${data && html`<${Pages} next=${data.next_cursor} cursor=${values.cursor} />`}
    ${bulk && html`<${BulkDialog} action=${bulk} filter=${filter} onClose=${() => openBulk(null)} />`}
  </${Section}>`;
}
/** Another filter or page shows the rows before it until its own are there: the page does not jump. */
function useLatest(path) {
  const answer = useLive(path);
  const last = useRef(null);
  if (answer.data) last.current = answer.data;
  return { data: answer.data || (answer.problem ? null : last.current), problem: answer.problem };
}
/** Nothing moves under a mouse: while it is over the table the rows stay, with their newest facts. */
function useSteady(tasks, path) {
  const [isHeld, setHeld] = useState(false);
  const kept = useRef({ path, tasks });
  if (!isHeld || kept.current.path !== path || !kept.current.tasks.length) kept.current = { path, tasks };
  const fresh = new Map(tasks.map((task) => [task.id, task]));
  const highest = kept.current.tasks[0]?.id ?? Infinity;
  return {
    tasks: isHeld ? kept.current.tasks.map((task) => fresh.get(task.id) || { ...task, isGone: tasks.length === 0 || task.id > tasks.at(-1).id }) : tasks,
    newer: isHeld ? tasks.filter((task) => task.id > highest).length : 0,
    hold: (value) => (event) => { if (event.pointerType === "mouse") setHeld(value); },
  };
}
function checks(tasks, chosen, choose) {
  const isEvery = tasks.every((task) => chosen.has(task.id));
  const flip = (id) => { const next = new Set(chosen); if (!next.delete(id)) next.add(id); choose(next); };
  return {
    name: "check", label: t("choose"),
    head: () => html`<input type="checkbox" aria-label=${t("choose_all")} checked=${isEvery} onChange=${() => choose(isEvery ? new Set() : new Set(tasks.map((task) => task.id)))} />`,
    cell: (task) => html`<input type="checkbox" aria-label=${t("choose_task", { id: task.id })} checked=${chosen.has(task.id)} onChange=${() => flip(task.id)} />`,
  };
}
export function Export({ filter, values = {} }) {
  return html`<span class="row" role="group" aria-label=${t("export")}>${["jsonl", "csv"].map((format) => html`<a key=${format} class="button plain" download=${`tasks.${format}`}
    href=${`${API}/tasks/export${query({ ...filter, ...values, format })}`}>${t("export_as", { format: format.toUpperCase() })}</a>`)}</span>`;
}

// ---- The filter -----------------------------------------------------------------------------------------------------
function clear() {
  goWith(Object.fromEntries([...FILTERS, "cursor"].map((name) => [name, ""])));
  document.querySelector(".filter [name=text]")?.focus();
}
function Filter({ filter, isFiltered }) {
  const [isOpen, open] = useState(MORE.some((name) => filter[name]));
  useEffect(() => { if (MORE.some((name) => filter[name])) open(true); }, [JSON.stringify(filter)]);
  const text = useRef(null);
  useEffect(() => {
    const slash = (event) => {
      if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog")) return;
      event.preventDefault();
      text.current.querySelector("input").focus();
    };
    addEventListener("keydown", slash);
    return () => removeEventListener("keydown", slash);
  }, []);
  const states = new Set((filter.status || "").split(",").filter(Boolean));
  const flip = (name) => {
    if (!states.delete(name)) states.add(name);
    goWith({ status: [...states].join(","), cursor: "" });
  };
  return html`<form class="filter" role="search" aria-label=${t("filter")} onSubmit=${(event) => event.preventDefault()}>
    <div class="row"><span class="chips" role="group" aria-label=${t("state")}>${STATES.map((name) => html`<button key=${name} type="button" class=${`chip ${tone(name)}`} aria-pressed=${states.has(name)} title=${t(`about_${name}`)} onClick=${() => flip(name)}><${Icon} name=${name} />${t(name)}</button>`)}</span>
      <span class="search" ref=${text}><${FilterField} name="text" value=${filter.text} placeholder=${t("text_hint")} isBare=${true} /></span>
      <button type="button" class="plain" aria-expanded=${isOpen} aria-controls="more-filters" onClick=${() => open(!isOpen)}>${t("more_filters")}</button>
      ${isFiltered && html`<button type="button" class="plain" onClick=${clear}>${t("clear")}</button>`}</div>
    <div id="more-filters" class="more" hidden=${!isOpen}>${isOpen && MORE.map((name) => html`<${FilterField} key=${name} name=${name} value=${filter[name]} />`)}</div></form>`;
}
const local = (iso) => {  // as <input type=datetime-local> writes a moment of the viewer's zone
  const at = new Date(iso);
  return Number.isNaN(at.getTime()) ? "" : new Date(at.getTime() - at.getTimezoneOffset() * 60000).toISOString().slice(0, 16);
};
function FilterField({ name, value = "", placeholder, isBare = false }) {
  const isMoment = name.startsWith("created_");
  const timer = useRef(0), written = useRef(value);
  const [typed, type] = useState(isMoment && value ? local(value) : value);
  useEffect(() => {
    if (value === written.current) return;  // it is what was typed here, without its last space
    clearTimeout(timer.current);
    written.current = value;
    type(isMoment && value ? local(value) : value);
  }, [value]);
  useEffect(() => () => clearTimeout(timer.current), []);
  const write = (next) => {
    type(next);
    clearTimeout(timer.current);
    const wanted = isMoment ? (next && new Date(next).toISOString()) : name === "parent_id" ? next.replace(/\D/g, "") : next.trim();
    timer.current = setTimeout(() => { written.current = wanted; goWith({ [name]: wanted, cursor: "" }, { replace: true }); }, isMoment ? 0 : PAUSE_MS);
  };
  const field = html`<input name=${name} value=${typed} type=${isMoment ? "datetime-local" : isBare ? "search" : "text"} inputMode=${name === "parent_id" ? "numeric" : null} placeholder=${placeholder} aria-label=${isBare ? t(`filter_${name}`) : null}
    autocomplete="off" spellcheck=${false} maxLength=${name === "error" ? 2000 : 1024} onInput=${(event) => write(event.target.value)} />`;
  return isBare ? field : html`<label class="field"><span>${t(`filter_${name}`)}</span>${field}</label>`;
}
