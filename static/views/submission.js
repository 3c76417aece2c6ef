/* How do many tasks get to the master, with nothing lost and nothing twice? In chunks, checked first, sent again as often as it takes. */
import { ask } from "../api.js";
import { contentKey } from "./content_key.js";

const CHUNK_TASKS = 1000, CHUNK_BYTES = 4 * 1024 * 1024, TRIES = 4, CHUNK_MS = 60000;

/** A task without a key gets one of its content, so that sending it again creates nothing twice. */
export function prepared(lines, batch) {
  return lines.map(({ task, ...where }) => {
    const whole = batch && (task.batch === undefined || task.batch === null) ? { ...task, batch } : { ...task };
    if (whole.unique_key === undefined || whole.unique_key === null) whole.unique_key = contentKey(whole);
    return { ...where, task: whole };
  });
}
function chunksOf(lines) {
  const chunks = [];
  let chunk = [], size = 0;
  for (const one of lines) {
    const bytes = JSON.stringify(one.task).length;
    if (chunk.length && (chunk.length >= CHUNK_TASKS || size + bytes > CHUNK_BYTES)) { chunks.push(chunk); [chunk, size] = [[], 0]; }
    chunk.push(one);
    size += bytes;
  }
  if (chunk.length) chunks.push(chunk);
  return chunks;
}
const pause = (ms) => new Promise((done) => { setTimeout(done, ms); });
/** One answer entry a task. A master that is away or busy is asked again a few times; one for which it is too much gets halves. */
async function send(path, chunk) {
  for (let tried = 1; ; tried += 1) {
    try {
      return (await ask(path, { method: "POST", body: chunk.map((one) => one.task), signal: AbortSignal.timeout(CHUNK_MS) })).tasks;
    } catch (problem) {
      if (problem.status === 413 && chunk.length > 1) {
        const middle = chunk.length >> 1;
        return [...await send(path, chunk.slice(0, middle)), ...await send(path, chunk.slice(middle))];
      }
      if (problem.isRefusal || problem.status === 401 || tried === TRIES) throw problem;
      await pause(1000 * 2 ** (tried - 1));
    }
  }
}

/** Asks the master about every task and keeps none: {good: lines, bad: [{place, order, message}], unknown: types that no device runs, known: how many are there already}. */
export async function rehearse(lines, tell) {
  const found = { good: [], bad: [], unknown: new Set(), known: 0 };
  let done = 0;
  for (const chunk of chunksOf(lines)) {
    for (const { index, ok, problem, created, warning } of await send("/tasks?dry_run=true", chunk)) {
      const { task, ...where } = chunk[index];
      if (!ok) { found.bad.push({ ...where, message: problem.detail }); continue; }
      found.good.push(chunk[index]);
      if (created === false) found.known += 1;
      if (warning) found.unknown.add(task.task_type);
    }
    tell(done += chunk.length);
  }
  return found;
}
/** Sends the lines in order. Answers {created, known, refused: [{place, message}], rest: lines not sent, problem}: what is in `rest` can be sent again. */
export async function submit(lines, tell) {
  const sent = { created: 0, known: 0, refused: [], rest: [], problem: null };
  let todo = lines;
  while (todo.length) {
    const [chunk] = chunksOf(todo.slice(0, CHUNK_TASKS));
    try {
      (await send("/tasks", chunk)).forEach(({ id, created, status }, i) => {
        if (created) sent.created += 1; else if (id === null) sent.refused.push({ place: chunk[i].place, order: chunk[i].order, message: status }); else sent.known += 1;
      });
    } catch (problem) {
      const at = Number(/^\[(\d+)\]/.exec(problem.field || "")?.[1] ?? NaN);
      if (!(problem.isRefusal && at < chunk.length)) { Object.assign(sent, { rest: todo, problem }); break; }
      sent.refused.push({ place: chunk[at].place, order: chunk[at].order, message: problem.message });  // it was refused as a whole: the others go without this one
      todo = todo.filter((one) => one !== chunk[at]);
      continue;
    }
    todo = todo.slice(chunk.length);
    tell({ ...sent, done: lines.length - todo.length });
  }
  return sent;
}
