/* How are many tasks cancelled or requeued at once? By a filter, after the count was told; or one by one, as they were checked. */
import { html, useEffect, useState } from "../vendor/htm-preact.js";
import { ask } from "../api.js";
import { soon } from "../live.js";
import { CurlButton, Dialog, Facts, Field, OPEN, Pill, Refusal, said, Waiting } from "../parts.js";
import { number, t } from "../text.js";

const FROM = { cancel: OPEN, requeue: ["failed", "cancelled"] };
const BACK = { cancel: "requeue", requeue: "cancel" };
const LONG_MS = 30 * 60 * 1000;

/** The filter of the list, narrowed to the states that the action is for: what is over is not counted as cancelled. */
function narrowed(action, filter) {
  const asked = filter.status ? filter.status.split(",") : FROM[action];
  const body = { ...filter, status: asked.filter((name) => FROM[action].includes(name)).join(",") };
  if (body.parent_id) body.parent_id = Number(body.parent_id);
  return body;
}
/** A change that may take minutes, because it goes through a great many tasks. */
export async function actLong(path, body, done) {
  try {
    const answer = await ask(path, { method: "POST", body, signal: AbortSignal.timeout(LONG_MS) });
    said(done(answer));
    return answer;
  } catch (problem) {
    said(problem.status ? problem.message : t("lost_first"));
    return null;
  } finally {
    soon(0);
  }
}

export function BulkDialog({ action, filter, onClose }) {
  const [count, setCount] = useState(null), [problem, setProblem] = useState(null), [reason, setReason] = useState(""), [isBusy, setBusy] = useState(false);
  const wanted = narrowed(action, filter);
  useEffect(() => {
    if (!wanted.status) { setCount({ matched: 0 }); return; }
    ask("/tasks/actions", { method: "POST", body: { action, filter: wanted, dry_run: true } }).then(setCount, setProblem);
  }, []);
  const body = { action, filter: wanted, ...(reason.trim() && { reason: reason.trim() }) };
  const go = async (event) => {
    event.preventDefault();
    setBusy(true);
    const answer = await actLong("/tasks/actions", body, ({ changed }) => t(`bulk_${action}_done`, { n: number(changed) }));
    if (answer) onClose(); else setBusy(false);
  };
  const n = count && (count.matched_is_capped ? t("at_least", { n: number(count.matched) }) : number(count.matched));
  const { status: states, ...others } = wanted;
  return html`<${Dialog} title=${t(`bulk_${action}_title`)} onClose=${onClose}>
    <${Refusal} problem=${problem} />
    ${!count ? !problem && html`<${Waiting} lines=${2} />` : count.matched === 0 ? html`<p>${t(`bulk_${action}_none`)}</p>` : html`<form onSubmit=${go}>
      <p class="bulk-count">${t(`bulk_${action}_about`, { n })}</p>
      <${Facts} facts=${[[t("state"), html`<span class="row">${states.split(",").map((name) => html`<${Pill} key=${name} name=${name} />`)}</span>`], ...Object.entries(others).map(([name, value]) => [t(`filter_${name}`), String(value)])]} />
      ${Object.keys(others).length === 0 && html`<p class="note amber">${t("bulk_whole")}</p>`}
      ${action === "cancel" && html`<${Field} label=${t("reason")} help=${t("bulk_reason_help")}><input value=${reason} maxLength="200" onInput=${(event) => setReason(event.target.value)} /></${Field}>`}
      <div class="row"><button type="submit" class=${action === "cancel" ? "danger" : "main"} disabled=${isBusy}>${isBusy ? t("bulk_busy") : t(`bulk_${action}_go`, { n })}</button>
        <${CurlButton} path="/tasks/actions" method="POST" body=${body} /></div></form>`}
  </${Dialog}>`;
}

/** The checked rows, one after the other; what changed can be taken back, what was refused is said. */
export async function actOnEach(ids, action) {
  const changed = [];
  let refused = 0, problem = null;
  for (const id of ids) {
    try {
      await ask(`/tasks/${id}/${action}`, { method: "POST", body: {} });
      changed.push(id);
    } catch (error) {
      if (!error.isRefusal) { problem = error; break; }
      refused += 1;
    }
  }
  soon(0);
  const words = [t(`bulk_${action}_done`, { n: number(changed.length) }), refused && t(`bulk_${action}_refused`, { n: number(refused) }), problem && (problem.status ? problem.message : t("lost_first"))];
  said(words.filter(Boolean).join(" "), changed.length ? () => actOnEach(changed, BACK[action]) : null);
}
