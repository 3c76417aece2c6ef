/* What does a file of tasks say? JSON, JSON lines or CSV, by the rules of main.py submit (task_files.py); what is wrong is told line by line. */
import { number, t } from "../text.js";

const LARGEST_TASK_BYTES = 4 * 1024 * 1024;
const TEXT_FIELDS = new Set(["task_type", "username", "app_id", "start_date", "end_date", "batch", "unique_key", "run_at", "pinned_device_id", "prefer_device_id", "same_device_as", "if_exists"]);
const NUMBER_FIELDS = new Set(["priority", "parent_id", "delay_seconds", "give_up_seconds", "execution_timeout_seconds", "max_retry_count", "max_batch_tasks", "prefer_seconds"]);

/** {tasks: [{place, order, task}], problems: [{place, order, message}]}, in the order of the file; `name` is the file's, "" for what was pasted. */
export function readTasks(text, name = "") {
  const found = { tasks: [], problems: [] };
  let order = 0;
  const wrong = (place, key, values = {}) => { found.problems.push({ place, order: order += 1, message: t(key, values) }); };
  const take = (place, task) => {
    const problem = problemOf(task);
    if (problem) wrong(place, ...problem); else found.tasks.push({ place, order: order += 1, task });
  };
  if (text.trim()) ({ json: readJson, jsonl: readJsonLines, csv: readCsv })[formOf(text, name)](text, take, wrong);
  return found;
}
const line = (n) => t("line_number", { n: number(n) });

function formOf(text, name) {
  const ending = name.toLowerCase().split(".").pop();
  if (ending === "json") return "json";
  if (["jsonl", "ndjson"].includes(ending)) return "jsonl";
  if (["csv", "tsv"].includes(ending)) return "csv";
  const start = text.trimStart();
  if (start[0] === "[") return "json";
  if (start[0] !== "{") return "csv";
  return isJson(start.split("\n", 1)[0]) && start.trimEnd().includes("\n") ? "jsonl" : "json";
}
function isJson(text) {
  try { JSON.parse(text); return true; } catch { return false; }
}

/** What can be known without the master; the rest it says itself. */
function problemOf(task) {
  if (task === null || typeof task !== "object" || Array.isArray(task)) return ["file_no_object"];
  if (typeof task.task_type !== "string" || !task.task_type) return ["file_no_type"];
  if (holdsUnsafe(task)) return ["file_large_number"];
  const text = JSON.stringify(task);
  if (/\p{Surrogate}/u.test(text)) return ["file_half_character"];
  return new TextEncoder().encode(text).length > LARGEST_TASK_BYTES ? ["file_large_task"] : null;
}
/** A browser keeps whole numbers up to 2^53; what is larger would be sent as another number. */
function holdsUnsafe(value) {
  if (typeof value === "number") return Math.abs(value) > Number.MAX_SAFE_INTEGER && Number.isInteger(value);
  return value !== null && typeof value === "object" && Object.values(value).some(holdsUnsafe);
}

function readJsonLines(text, take, wrong) {
  text.split("\n").forEach((one, i) => {
    if (!one.trim()) return;
    try { take(line(i + 1), JSON.parse(one)); } catch (error) { wrong(line(i + 1), "file_no_json", { reason: error.message }); }
  });
}
/** A list of tasks, {"tasks": [...]}, or one task. */
function readJson(text, take, wrong) {
  const first = text.search(/[^ \t\r\n]/);
  if (text[first] !== "[") {
    let whole;
    try { whole = JSON.parse(text); } catch (error) { wrong(placeOf(error, text), "file_no_json", { reason: error.message }); return; }
    if (whole === null || typeof whole !== "object") { wrong(line(1), "file_no_list"); return; }
    const tasks = Array.isArray(whole.tasks) ? whole.tasks : [whole];
    tasks.forEach((task, i) => take(t("task_in_file", { n: number(i + 1) }), task));
    return;
  }
  let at = first + 1, lines = text.slice(0, at).split("\n").length;
  const skip = () => { for (; at < text.length && " \t\r\n".includes(text[at]); at += 1) if (text[at] === "\n") lines += 1; };
  skip();
  while (text[at] !== "]") {
    if (text[at] !== "{") { wrong(line(lines), "file_no_brace", { found: text[at] ?? t("the_end") }); return; }
    const end = endOfObject(text, at);
    if (end < 0) { wrong(line(lines), "file_not_closed"); return; }
    const one = text.slice(at, end);
    try { take(line(lines), JSON.parse(one)); } catch (error) { wrong(line(lines), "file_no_json", { reason: error.message }); }
    lines += one.split("\n").length - 1;
    at = end;
    skip();
    if (text[at] === ",") { at += 1; skip(); } else if (text[at] !== "]") { wrong(line(lines), "file_no_comma", { found: text[at] ?? t("the_end") }); return; }
  }
  at += 1;
  skip();
  if (at < text.length) wrong(line(lines), "file_after_list");
}
/** Not every browser says where; then it is somewhere in the file. */
function placeOf(error, text) {
  const at = /position (\d+)/.exec(error.message);
  return at ? line(text.slice(0, Number(at[1])).split("\n").length) : t("the_file");
}
/** Behind the brace that closes the one at `at`, or -1. */
function endOfObject(text, at) {
  let depth = 0, isText = false;
  for (; at < text.length; at += 1) {
    const sign = text[at];
    if (isText) { if (sign === "\\") at += 1; else if (sign === '"') isText = false; } else if (sign === '"') isText = true; else if (sign === "{") depth += 1; else if (sign === "}" && (depth -= 1) === 0) return at + 1;
  }
  return -1;
}

/** Columns are a task's fields; task_data.X is one value of task_data; any other goes into task_data as text. */
function readCsv(text, take, wrong) {
  const delimiter = [",", ";", "\t"].find((sign) => text.split(/\r?\n|\r/, 1)[0].includes(sign)) || ",";
  let header = null;
  for (const { cells, at, problem } of rowsOf(text, delimiter)) {
    if (problem) { wrong(line(at), problem); return; }
    if (!header) {
      header = cells.map((name) => name.trim());
      if (!header.includes("task_type")) { wrong(line(at), "file_no_type_column"); return; }
      if (header.includes("") || new Set(header).size < header.length) { wrong(line(at), "file_columns"); return; }
    } else if (cells.some(Boolean)) {
      if (cells.length !== header.length) { wrong(line(at), "file_cells", { n: number(cells.length), limit: number(header.length) }); continue; }
      const [task, bad] = taskOfCells(header, cells);
      if (bad) wrong(line(at), ...bad); else take(line(at), task);
    }
  }
}
/** Rows with the line on which they begin: a quoted cell may span lines. */
function* rowsOf(text, delimiter) {
  let cells = [], cell = "", lines = 1, began = 1, state = "start";  // start of a cell, plain, quoted, after a closing quote
  for (let at = 0; at <= text.length; at += 1) {
    const sign = text[at] ?? "end";
    if (state === "quoted") {
      if (sign === "end") { yield { at: began, problem: "file_quote_open" }; return; }
      if (sign === '"' && text[at + 1] === '"') { cell += '"'; at += 1; } else if (sign === '"') state = "closed"; else { cell += sign; if (sign === "\n") lines += 1; }
    } else if (sign === '"' && state === "start") state = "quoted";
    else if (sign === delimiter) { cells.push(cell); [cell, state] = ["", "start"]; } else if (sign === "\n" || sign === "\r" || sign === "end") {
      if (sign === "\r" && text[at + 1] === "\n") at += 1;
      cells.push(cell);
      if (sign !== "end" || cells.length > 1 || cell) yield { cells, at: began };
      lines += 1;
      [cells, cell, began, state] = [[], "", lines, "start"];
    } else if (state === "closed") { yield { at: began, problem: "file_after_quote" }; return; } else { cell += sign; state = "plain"; }
  }
}
function taskOfCells(header, cells) {
  const task = {}, more = {};
  for (const [i, name] of header.entries()) {
    const cell = cells[i];
    if (!cell) continue;
    if (TEXT_FIELDS.has(name)) task[name] = cell;
    else if (name === "required_tags") task[name] = cell.split(/[\s,;]+/).filter(Boolean);
    else if (NUMBER_FIELDS.has(name) || name === "task_data") {
      task[name] = jsonCell(cell);
      const isRight = name === "task_data" ? task[name] !== null && typeof task[name] === "object" && !Array.isArray(task[name]) : typeof task[name] === "number";
      if (!isRight) return [null, [name === "task_data" ? "file_cell_object" : "file_cell_number", { name, cell: cell.slice(0, 40) }]];
    } else if (name.startsWith("task_data.")) more[name.slice("task_data.".length)] = jsonCell(cell);
    else more[name] = cell;
  }
  if (Object.keys(more).length) task.task_data = { ...task.task_data, ...more };
  return [task, null];
}
/** A number, true, a list or an object where the cell is one; else its text (00123 and 2026-01-01 are text). */
function jsonCell(cell) {
  try { return JSON.parse(cell); } catch { return cell; }
}
