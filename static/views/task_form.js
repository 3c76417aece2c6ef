/* Which task do the fields of a form say, and what is wrong in them? From a task to its form's texts and back; no drawing here. */
import { number, t } from "../text.js";
import { fieldsOf } from "./task_types.js";

export const NAME = /^[A-Za-z0-9_.-]{1,64}$/;
const DATE = /^\d{4}-\d\d-\d\d$/;

const get = (task, at) => at.split(".").reduce((value, name) => (value === null || typeof value !== "object" ? undefined : value[name]), task);
function put(task, at, value) {
  const names = at.split("."), last = names.pop();
  const holder = names.reduce((inner, name) => (inner[name] ??= {}), task);
  if (value !== null && typeof value === "object" && !Array.isArray(value) && holder[last]) Object.assign(holder[last], value);
  else holder[last] = value;
}
function cut(task, at) {
  const names = at.split("."), last = names.pop(), holder = get(task, names.join("."));
  if (holder && typeof holder === "object") delete holder[last];
}

/** The text of each field, by its place in the task; "rest" is what of task_data has no field. */
export function textsOf(task) {
  const texts = { task_type: task.task_type }, rest = structuredClone({ task_data: task.task_data || {} });
  const fields = fieldsOf(task.task_type);
  for (const field of fields) {
    const value = get(task, field.at);
    if (value === undefined || value === null || !fits(field, value)) continue;
    texts[field.at] = textOf(field, value);
    if (field.at.startsWith("task_data.") && !(field.kind === "flag" && typeof value === "object")) cut(rest, field.at);
  }
  for (const field of fields) if (field.kind === "flag") { const left = get(rest, field.at); if (left && typeof left === "object" && !Object.keys(left).length) cut(rest, field.at); }
  if (Object.keys(rest.task_data).length) texts.rest = JSON.stringify(rest.task_data, null, 2);
  return texts;
}
/** A value that the field cannot show stays in "rest", so that nothing of a task is lost. */
function fits(field, value) {
  if (field.kind === "json") return typeof value === "object";
  if (["lines", "tags", "choices"].includes(field.kind)) return typeof value === "string" || (Array.isArray(value) && value.every((one) => typeof one === "string" && !one.includes("\n")));
  if (field.kind === "flag") return value === true || (typeof value === "object" && !Array.isArray(value));
  if (field.kind === "flag_or_url") return value === true || typeof value === "string";
  if (field.kind === "choice") return field.choices.includes(value);
  return typeof value === (["integer", "number"].includes(field.kind) ? "number" : "string");
}
function textOf(field, value) {
  if (field.kind === "json") return JSON.stringify(value, null, 2);
  if (["lines", "choices"].includes(field.kind)) return [value].flat().join("\n");
  if (field.kind === "tags") return [value].flat().join(" ");
  if (field.kind === "flag") return "true";
  if (field.kind === "moment") return new Date(Date.parse(value) - new Date(value).getTimezoneOffset() * 60000).toISOString().slice(0, 16);
  return String(value);
}

/** {task, problems: {place: words}} */
export function taskOf(texts) {
  const type = (texts.task_type || "").trim(), task = { task_type: type }, problems = {};
  if (!NAME.test(type)) problems.task_type = t("form_type");
  const rest = readJson(texts.rest, problems, "rest");
  if (rest) put(task, "task_data", rest);
  for (const field of fieldsOf(type)) {
    if (field.needs && !texts[field.needs]) continue;
    const text = (texts[field.at] || "").trim();
    if (!text) { if (field.isRequired) problems[field.at] = t("form_required"); continue; }
    const value = valueOf(field, text, problems, texts);
    if (value !== undefined) put(task, field.at, value);
  }
  if (texts.delay_seconds && texts.run_at) problems.run_at = t("form_one_time");
  if (type === "crawl" && texts["task_data.form"] && texts["task_data.json"]) problems["task_data.json"] = t("form_one_body");
  return { task, problems };
}
function readJson(text, problems, at) {
  if (!(text || "").trim()) return undefined;
  try {
    const value = JSON.parse(text);
    if (value !== null && typeof value === "object" && !Array.isArray(value)) return value;
    problems[at] = t("form_object");
  } catch (error) {
    problems[at] = t("form_json", { reason: error.message });
  }
  return undefined;
}
function valueOf(field, text, problems, texts) {
  const wrong = (key, values) => { problems[field.at] = t(key, values); return undefined; };
  const { kind } = field;
  if (kind === "integer" || kind === "number") {
    const n = Number(text), [low, high] = [field.min ?? 0, field.max ?? Number.MAX_SAFE_INTEGER];
    if (!Number.isFinite(n) || (kind === "integer" && !Number.isInteger(n)) || n < low || n > high) return wrong(field.max === undefined ? "form_from" : kind === "integer" ? "form_integer" : "form_number", { low: number(low, 3), high: number(high) });
    return n;
  }
  if (kind === "flag") return text !== "true" ? undefined : field.at === "task_data.follow" || field.at === "task_data.pull" ? {} : true;
  if (kind === "flag_or_url") return text === "true" ? true : isUrl(text) ? text : wrong("form_true_or_url");
  if (kind === "url") return isUrl(text) && text.length <= 1024 ? text : wrong("form_url");
  if (kind === "date") {
    if (!DATE.test(text) || Number.isNaN(Date.parse(text))) return wrong("form_date");
    return field.notBefore && texts[field.notBefore] > text ? wrong("form_order") : text;
  }
  if (kind === "moment") return Number.isNaN(Date.parse(text)) ? wrong("form_moment") : new Date(text).toISOString();
  if (kind === "choice") return field.choices.find((choice) => String(choice) === text) ?? wrong("form_choice");
  if (kind === "json") return field.at === "task_data.json" ? anyJson(text, wrong) : readJson(text, problems, field.at);
  if (kind === "tags") { const tags = text.split(/[\s,;]+/).filter(Boolean); return tags.every((tag) => NAME.test(tag)) ? tags : wrong("form_tags"); }
  if (kind === "lines" || kind === "choices") {
    const lines = text.split("\n").map((line) => line.trim()).filter(Boolean);
    const bad = field.isPattern && lines.find((line) => !isPattern(line));
    return bad ? wrong("form_pattern", { pattern: bad }) : lines;
  }
  if (field.pattern && !field.pattern.test(text)) return wrong(field.at === "app_id" ? "form_app_id" : "form_type");
  return field.max && text.length > field.max ? wrong("form_long", { n: number(field.max) }) : text;
}
function anyJson(text, wrong) {
  try { return JSON.parse(text); } catch (error) { return wrong("form_json", { reason: error.message }); }
}
const isUrl = (text) => { try { return ["http:", "https:"].includes(new URL(text).protocol); } catch { return false; } };
/** Python's expressions are not the browser's: only what neither reads is told here, the device says the rest. */
const isPattern = (text) => { try { new RegExp(text); return true; } catch { return /\(\?[PaiLmsux]/.test(text); } };
