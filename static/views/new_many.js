/* What is in this file, is it right, and did all of it arrive? Paste or drop it, look at its first rows, send it in chunks. */
import { html, useEffect, useMemo, useRef, useState } from "../vendor/htm-preact.js";
import { curl } from "../api.js";
import { soon } from "../live.js";
import { Command, Field, link, Meter, Table } from "../parts.js";
import { bytes, number, percent, t } from "../text.js";
import { prepared, rehearse, submit } from "./submission.js";
import { readTasks } from "./read_tasks.js";

const LARGEST_FILE = 64e6, SHOWN_IN_BOX = 200000, ROWS_SHOWN = 8, PROBLEMS_SHOWN = 50, COLUMNS_SHOWN = 8, PAUSE_MS = 250;

export function ManyTasks() {
  const [source, setSource] = useState({ text: "", name: "" }), [batch, setBatch] = useState(""), [fileProblem, setFileProblem] = useState("");
  const [step, setStep] = useState({ name: "idle" });  // idle, checking {done}, checked {found}, sending {done, ...}, sent {...}
  const { tasks, problems } = useMemo(() => readTasks(source.text, source.name), [source]);
  const take = (text, name) => { setSource({ text, name }); setStep({ name: "idle" }); };
  const open = async (file) => {
    setFileProblem("");
    if (!file) return;
    if (file.size > LARGEST_FILE) { setFileProblem(t("file_large", { size: bytes(file.size), limit: bytes(LARGEST_FILE), name: file.name })); return; }
    try { take(new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer()), file.name); } catch { setFileProblem(t("file_no_utf8", { name: file.name })); }
  };
  const isBusy = ["checking", "sending"].includes(step.name);
  const check = async () => {
    setStep({ name: "checking", done: 0, all: tasks.length });
    try {
      setStep({ name: "checked", found: await rehearse(prepared(tasks, batch.trim()), (done) => setStep({ name: "checking", done, all: tasks.length })) });
    } catch (problem) {
      setStep({ name: "idle", problem: problem.status ? problem.message : t("lost_first") });
    }
  };
  const send = async (lines, left, before = { created: 0, known: 0, refused: [] }) => {
    const all = lines.length;
    setStep({ name: "sending", done: 0, all, left });
    const sent = await submit(lines, ({ done }) => setStep({ name: "sending", done, all, left }));
    setStep({ name: "sent", left, sent: { ...sent, created: before.created + sent.created, known: before.known + sent.known, refused: [...before.refused, ...sent.refused] } });
    soon(0);
  };
  const all = [...problems, ...(step.found?.bad || step.left || [])].sort((a, b) => a.order - b.order);  // told until the end: what was left out is not forgotten
  const shownBatch = batch.trim() || (tasks.length && tasks.every(({ task }) => task.batch === tasks[0].task.batch) ? tasks[0].task.batch : "");
  return html`<div class="card pad many">
    <${Source} source=${source} take=${take} open=${open} isBusy=${isBusy} />
    ${fileProblem && html`<p class="note red" role="alert">${fileProblem}</p>`}
    <${Field} label=${t("batch")} help=${t("many_batch_help")}><input name="batch" value=${batch} maxLength="128" disabled=${isBusy} onInput=${(event) => { setBatch(event.target.value); setStep({ name: "idle" }); }} /></${Field}>
    ${source.text.trim() && html`<p class="counted" role="status"><b>${t("tasks_read", { n: number(tasks.length) })}</b>${problems.length > 0 && html` <span class="red-text">${t("lines_wrong", { n: number(problems.length) })}</span>`}</p>`}
    <${Problems} problems=${all} />
    ${tasks.length > 0 && html`<${Preview} tasks=${tasks} />`}
    ${step.problem && html`<p class="note red" role="alert">${step.problem}</p>`}
    ${isBusy && html`<${Meter} part=${step.all ? step.done / step.all : 0} label=${t(step.name)} words=${`${t(step.name)} ${t("of", { n: number(step.done), limit: number(step.all) })} · ${percent(step.all ? step.done / step.all : 0)}`} />`}
    ${step.name === "checked" && html`<${Checked} found=${step.found} wrong=${all.length} />`}
    ${step.name === "sent" ? html`<${Sent} sent=${step.sent} batch=${shownBatch} left=${all.length} again=${() => send(step.sent.rest, step.left, step.sent)} />`
      : tasks.length > 0 && html`<div class="row">${step.name === "checked" ? step.found.good.length > 0 && html`<button type="button" class="main" onClick=${() => send(step.found.good, step.found.bad)}>${t(all.length ? "send_others" : "send_all", { n: number(step.found.good.length), wrong: number(all.length) })}</button>`
        : html`<button type="button" class="main" disabled=${isBusy} onClick=${check}>${t("check_many", { n: number(tasks.length) })}</button>`}</div>`}
    ${tasks.length > 0 && html`<details><summary>${t("same_in_terminal")}</summary><div class="stack"><${Command} text=${commandOf(source.name, batch.trim())} /><${Command} text=${curlOf(prepared(tasks.slice(0, 2), batch.trim()), tasks.length)} /></div></details>`}</div>`;
}
const quoted = (text) => (/^[\w.-]+$/.test(text) ? text : `'${text.replace(/'/g, "'\\''")}'`);
const commandOf = (name, batch) => `python main.py submit ${quoted(name || "tasks.jsonl")}${batch ? ` --batch ${quoted(batch)}` : ""}`;
const curlOf = (lines, n) => (n <= lines.length ? curl("/tasks", { method: "POST", body: lines.map((one) => one.task) })
  : `${curl("/tasks", { method: "POST" })} -H "Content-Type: application/json" --data-binary @tasks.json`);

function Source({ source, take, open, isBusy }) {
  const [isOver, over] = useState(false), timer = useRef(0), [typed, type] = useState(null);
  useEffect(() => type(null), [source]);
  useEffect(() => () => clearTimeout(timer.current), []);
  const write = (event) => {
    const text = event.target.value;
    type(text);
    clearTimeout(timer.current);
    timer.current = setTimeout(() => take(text, ""), PAUSE_MS);
  };
  const drop = (event) => { event.preventDefault(); over(false); if (!isBusy) open(event.dataTransfer.files[0]); };
  const isShort = source.text.length <= SHOWN_IN_BOX;
  return html`<div class=${`drop ${isOver ? "over" : ""}`} onDragOver=${(event) => { event.preventDefault(); over(true); }} onDragLeave=${() => over(false)} onDrop=${drop}>
    <div class="row"><label class="button plain"><input class="unseen" type="file" accept=".json,.jsonl,.ndjson,.csv,.tsv" disabled=${isBusy} onChange=${(event) => { open(event.target.files[0]); event.target.value = ""; }} />${t("choose_file")}</label>
      <span class="quiet">${source.name || t("or_drop")}</span>${source.text && html`<button type="button" class="plain" disabled=${isBusy} onClick=${() => take("", "")}>${t("clear")}</button>`}</div>
    ${isShort ? html`<label class="field"><span>${t("tasks_as_text")}</span><textarea name="tasks" rows="8" spellcheck=${false} disabled=${isBusy} value=${typed ?? source.text} onInput=${write}
      placeholder=${'task_type,batch,task_data.url\ncrawl,my-batch,https://example.org/'} /><small>${t("many_help")}</small></label>` : html`<p class="quiet">${t("file_not_shown", { size: bytes(source.text.length) })}</p>`}</div>`;
}
function Problems({ problems }) {
  return problems.length > 0 && html`<div class="note red problems" role="alert"><b>${t("problems_by_line")}</b><ul>${problems.slice(0, PROBLEMS_SHOWN).map((one, i) => html`<li key=${i}><b>${one.place}</b>: ${one.message}</li>`)}</ul>
    ${problems.length > PROBLEMS_SHOWN && html`<p>${t("more_problems", { n: number(problems.length - PROBLEMS_SHOWN) })}</p>`}</div>`;
}
function Preview({ tasks }) {
  const rows = tasks.slice(0, ROWS_SHOWN), names = [...new Set(rows.flatMap(({ task }) => Object.keys(task)))].sort((a, b) => (b === "task_type") - (a === "task_type"));
  const words = (value) => { const text = typeof value === "object" ? JSON.stringify(value) : String(value); return text.length > 160 ? `${text.slice(0, 160)}…` : text; };
  return html`<div class="stack"><h3>${t(tasks.length > rows.length ? "first_rows" : "all_rows", { n: number(rows.length) })}</h3><${Table} label=${t("preview")} rows=${rows} keyOf=${(row) => row.place} columns=${[
    { name: "place", label: t("place"), cell: (row) => row.place },
    ...names.slice(0, COLUMNS_SHOWN).map((name) => ({ name: `of-${name.replace(/\W/g, "-")}`, label: name, cell: ({ task }) => (task[name] === undefined || task[name] === null ? "" : words(task[name])) }))]} /></div>`;
}
function Checked({ found, wrong }) {
  return html`<div class="stack" role="status">${wrong === 0 && html`<p class="note green">${t("all_right", { n: number(found.good.length) })}</p>`}
    ${found.known > 0 && html`<p class="note violet">${t("known_already", { n: number(found.known) })}</p>`}
    ${[...found.unknown].slice(0, 10).map((type) => html`<p key=${type} class="note amber">${t("nobody_runs", { type })}</p>`)}</div>`;
}
function Sent({ sent, batch, left, again }) {
  return html`<div class="stack" role="status"><p class=${`note ${sent.problem ? "red" : sent.refused.length || left ? "amber" : "green"}`}>${[t("sent_created", { n: number(sent.created) }), sent.known && t("sent_known", { n: number(sent.known) }), sent.refused.length && t("sent_refused", { n: number(sent.refused.length) }), left > 0 && t("sent_left", { n: number(left) })].filter(Boolean).join(" ")}
      ${sent.problem && html`<br />${t("sent_rest", { n: number(sent.rest.length) })} ${sent.problem.status ? sent.problem.message : t("lost_first")}`}</p>
    <${Problems} problems=${sent.refused.map((one) => ({ ...one, message: ["batch_full", "batch_cancelled"].includes(one.message) ? t(`refused_${one.message}`) : one.message }))} />
    <div class="row">${sent.rest.length > 0 && html`<button type="button" class="main" onClick=${again}>${t("send_rest", { n: number(sent.rest.length) })}</button>`}
      <a class="button plain" href=${batch ? link("batches", batch) : link("tasks")}>${batch ? t("look_at_batch", { name: batch }) : t("look_at_tasks")}</a></div></div>`;
}
