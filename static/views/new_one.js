/* What is to be done, and how is it written down? A form for one task: the fields of its type, then those that every task may have. */
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { ask } from "../api.js";
import { soon } from "../live.js";
import { act, CurlButton, Field, link, Refusal, said, Waiting } from "../parts.js";
import { may } from "../session.js";
import { has, t } from "../text.js";
import { taskOf, textsOf } from "./task_form.js";
import { fieldsOf, TYPES } from "./task_types.js";

export function OneTask({ from, types }) {
  const [texts, setTexts] = useState(from ? null : { task_type: "crawl" });
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    if (!from) return;
    // The key stays behind: with it the master would find the old task instead of making a new one.
    ask(`/tasks/${encodeURIComponent(from)}`).then((task) => setTexts(textsOf({ ...task, unique_key: null })), setProblem);
  }, [from]);
  if (problem) return html`<${Refusal} problem=${problem.status === 404 ? { message: t("not_found", { id: from }) } : problem} />`;
  if (!texts) return html`<${Waiting} lines=${6} />`;
  return html`<${TaskForm} texts=${texts} setTexts=${setTexts} from=${from} types=${types} />`;
}

/** Types that devices run besides those with a form of their own. */
const otherTypes = (types) => (types || []).map((one) => one.task_type).filter((name) => !Object.hasOwn(TYPES, name)).sort();

function TaskForm({ texts, setTexts, from, types }) {
  const others = otherTypes(types), form = useRef(null);
  const [isTold, tell] = useState(false), [refusal, setRefusal] = useState(null), [isBusy, setBusy] = useState(false), [isOther, setOther] = useState(false);
  const { task, problems } = taskOf(texts);
  const set = (at, value) => { setTexts((before) => ({ ...before, [at]: value })); setRefusal(null); };
  const fields = fieldsOf(texts.task_type), shown = (field) => !field.needs || texts[field.needs];
  const refusedField = refusal?.field && fields.some((field) => field.at === refusal.field) ? refusal.field : null;
  const problemOf = (at) => (at === refusedField ? refusal.message : isTold ? problems[at] : null);
  const knows = Object.hasOwn(TYPES, texts.task_type) || others.includes(texts.task_type);
  const part = (one) => fields.filter((field) => shown(field) && one(field)).map((field) => html`<${Input} key=${field.at} field=${field} type=${texts.task_type} text=${texts[field.at] || ""} set=${set} problem=${problemOf(field.at)} />`);
  const rare = fields.filter((field) => field.isRare && texts[field.at]).length > 0 || Boolean(isTold && fields.some((field) => field.isRare && problems[field.at])) || fields.some((field) => field.isRare && field.at === refusedField);
  const send = async (event) => {
    event.preventDefault();
    tell(true);
    if (Object.keys(problems).length) { setTimeout(() => form.current?.querySelector("[aria-invalid=true]")?.focus(), 0); return; }
    setBusy(true);
    try {
      const { id, created } = await ask("/tasks", { method: "POST", body: task });
      said(t(created ? "submitted_one" : "already_there", { id }), created && may("operator") ? () => act(`/tasks/${id}/cancel`, { done: t("cancelled_now") }) : null);
      soon(0);
      location.hash = link("tasks", id);
    } catch (error) {
      setRefusal(error.status ? error : { message: t("lost_first") });
      setBusy(false);
    }
  };
  return html`<form class="card pad task-form" ref=${form} noValidate onSubmit=${send}>
    ${from && html`<p class="note violet">${t("from_task", { id: from })} <a href=${link("tasks", from)}>${t("task_number", { id: from })}</a></p>`}
    <div class="fields"><${Field} label=${t("task_type")} help=${has(`type_${texts.task_type}`) ? t(`type_${texts.task_type}`) : t("type_other")} problem=${!isOther && knows ? problemOf("task_type") : null}>
        <select name="kind" value=${!isOther && knows ? texts.task_type : ""} onChange=${(event) => { setOther(!event.target.value); set("task_type", event.target.value); tell(false); }}>
          ${[...Object.keys(TYPES), ...others].map((name) => html`<option key=${name} value=${name}>${name}</option>`)}<option value="">${t("another_type")}</option></select></${Field}>
      ${(isOther || !knows) && html`<${Field} label=${t("type_name")} help=${t("form_type")} problem=${problemOf("task_type")}><input name="task_type" value=${texts.task_type || ""} maxLength="64" spellcheck=${false} autocomplete="off" aria-invalid=${Boolean(problemOf("task_type"))} onInput=${(event) => set("task_type", event.target.value)} /></${Field}>`}</div>
    ${types && texts.task_type && !problems.task_type && !types.some((one) => one.task_type === texts.task_type && one.online > 0) && html`<p class="note amber" role="status">${t("nobody_runs", { type: texts.task_type })}</p>`}
    ${part((field) => field.isOwn && !field.isRare).length > 0 && html`<fieldset><legend>${t("what_to_do")}</legend><div class="fields">${part((field) => field.isOwn && !field.isRare)}</div></fieldset>`}
    <${Field} label=${t(fields.some((field) => field.isOwn) ? "rest_of_data" : "task_data")} help=${t("help_rest")} problem=${problemOf("rest")}><textarea name="rest" rows=${knows && Object.hasOwn(TYPES, texts.task_type) ? 2 : 6} class=${Object.hasOwn(TYPES, texts.task_type) ? "short" : ""} value=${texts.rest || ""} spellcheck=${false} placeholder="{}" aria-invalid=${Boolean(problemOf("rest"))} onInput=${(event) => set("rest", event.target.value)} /></${Field}>
    <fieldset><legend>${t("how_to_do")}</legend><div class="fields">${part((field) => !field.isOwn && !field.isRare)}</div></fieldset>
    <details class="rare" open=${rare}><summary>${t("more_settings")}</summary><div class="fields">${part((field) => field.isRare)}</div></details>
    ${refusal && !refusedField && html`<${Refusal} problem=${refusal} />`}
    ${isTold && Object.keys(problems).length > 0 && html`<p class="wrong" role="alert">${t("form_problems", { n: Object.keys(problems).length })}</p>`}
    <div class="row"><button type="submit" class="main" disabled=${isBusy}>${t("submit_one")}</button><${CurlButton} path="/tasks" method="POST" body=${task} /></div></form>`;
}

function Input({ field, type, text, set, problem }) {
  const name = field.at.replace("task_data.", ""), key = field.isOwn ? `help_${type}_${name}` : `help_${name}`;
  const common = { name: field.at, value: text, "aria-invalid": Boolean(problem), onInput: (event) => set(field.at, event.target.value) };
  const label = html`<code>${name}</code>${field.isRequired && html` <span class="must">${t("required")}</span>`}`, help = has(key) ? t(key) : null;
  if (field.kind === "flag") {
    return html`<label class="tick"><input type="checkbox" name=${field.at} checked=${text === "true"} onChange=${(event) => set(field.at, event.target.checked ? "true" : "")} /><span><code>${name}</code>${help && html`<small>${help}</small>`}</span></label>`;
  }
  if (field.kind === "choices") {
    const chosen = new Set(text.split("\n").filter(Boolean));
    const flip = (one) => { if (!chosen.delete(one)) chosen.add(one); set(field.at, field.choices.filter((choice) => chosen.has(choice)).join("\n")); };
    return html`<fieldset class="wide options"><legend>${label}</legend>${help && html`<small>${help}</small>`}<div class="ticks">${field.choices.map((one, i) => html`<label key=${one} class="tick"><input type="checkbox" aria-invalid=${i === 0 && Boolean(problem)} checked=${chosen.has(one)} onChange=${() => flip(one)} /><span>${one}</span></label>`)}</div>
      ${problem && html`<small class="wrong" role="alert">${problem}</small>`}</fieldset>`;
  }
  const inputs = {
    choice: () => html`<select ...${common}><option value="">–</option>${field.choices.map((one) => html`<option key=${one} value=${String(one)}>${String(one)}</option>`)}</select>`,
    lines: () => html`<textarea ...${common} class="short" rows="2" spellcheck=${false} placeholder=${field.example} />`,
    json: () => html`<textarea ...${common} class="short" rows="2" spellcheck=${false} placeholder=${field.example} />`,
    date: () => html`<input ...${common} type="date" />`,
    moment: () => html`<input ...${common} type="datetime-local" />`,
  };
  const plain = () => html`<input ...${common} type=${field.kind === "url" ? "url" : "text"} inputMode=${["integer", "number"].includes(field.kind) ? "decimal" : null} placeholder=${field.example} spellcheck=${false} autocomplete="off" />`;
  return html`<${Field} label=${label} help=${help} problem=${problem} className=${field.isWide ? "wide" : ""}>${(inputs[field.kind] || plain)()}</${Field}>`;
}
