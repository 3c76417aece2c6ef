/* What does the fleet do, and what needs a person now? */
import { html, useState } from "../vendor/htm-preact.js";
import { Chart } from "../chart.js";
import { useLive } from "../live.js";
import { Card, CurlButton, DeviceLink, Empty, Icon, link, Meter, Refusal, Section, STATES, TaskLink, tone, Waiting } from "../parts.js";
import { big, bytes, duration, number, percent, sentence, t, why } from "../text.js";
import { FirstSteps } from "./first_steps.js";

export function Overview() {
  const { data: overview, problem } = useLive("/system/overview");
  if (!overview) return problem ? html`<${Refusal} problem=${problem} />` : html`<${Waiting} />`;
  const total = STATES.reduce((sum, name) => sum + (overview.tasks[name] || 0), 0);
  const devices = Object.values(overview.devices || {}).reduce((sum, n) => sum + n, 0);
  return html`<${Section} title=${t("states")} aside=${html`<div><${CurlButton} path="/system/overview" /></div>`}>
      <${Tiles} counts=${overview.tasks} total=${total} />
      <p class="quiet">${t("about", { mode: overview.mode, version: overview.version, uptime: duration(overview.uptime_seconds), strategy: overview.strategy, database: bytes(overview.database_bytes) })}</p>
    </${Section}>
    ${(devices === 0 || total === 0) && html`<${FirstSteps} hasDevices=${devices > 0} hasTasks=${total > 0} hasWorkerFile=${overview.has_worker_file} />`}
    <div class="two"><${Attention} overview=${overview} /><${Fleet} overview=${overview} /></div>
    <${Throughput} />`;
}

function Tiles({ counts, total }) {
  return html`<div class="card tiles">${["all", ...STATES].map((name) => {
    const n = name === "all" ? total : counts[name] || 0;
    return html`<a key=${name} class=${`tile ${name === "all" ? "every" : tone(name)} ${n ? "" : "zero"}`} href=${link("tasks", null, name === "all" ? {} : { status: name })} title=${t(`about_${name}`)} data-state=${name}>
      <b title=${n < 1e6 ? null : number(n)}>${big(n)}</b><span><${Icon} name=${name} />${t(name)}</span></a>`;
  })}</div>
  <div class="shares" aria-hidden="true">${STATES.map((name) => html`<i key=${name} class=${tone(name)} ref=${(node) => node && (node.style.flexGrow = counts[name] || 0)} />`)}</div>`;
}

/** Each kind says what it is about; one that a newer master knows is told in the master's own sentence. */
function Attention({ overview }) {
  const items = overview.attention || [];
  return html`<${Section} title=${t("attention")}><${Card}>
    ${items.length === 0 ? html`<${Empty}><p>${t("attention_none")}</p></${Empty}>` : html`<ul class="attention">${items.map((item) => html`<li key=${item.kind}>
      <span class=${`pill ${["oldest_waiting", "paused", "limit_closed"].includes(item.kind) ? "amber" : "red"}`}>${t(`attention_${item.kind}`)}</span>
      <p>${item.kind === "oldest_waiting" && overview.oldest_waiting ? oldestWords(overview.oldest_waiting) : sentence(item.detail)} <${About} item=${item} /></p></li>`)}</ul>`}
  </${Card}></${Section}>`;
}
function About({ item }) {
  const ids = item.ids || [];
  if (item.kind.startsWith("device") || item.kind === "black_hole") return ids.map((id) => html`<${DeviceLink} key=${id} id=${id} /> `);
  if (["limit_closed", "paused"].includes(item.kind)) return html`<a href=${link("dispatch")}>${t("nav_dispatch")}</a>`;
  if (item.kind === "failures") return html`<a href=${link("tasks", null, { status: "failed" })}>${t("failed")}</a>`;
  return ids.map((id) => html`<${TaskLink} key=${id} id=${id} /> `);
}

function Fleet({ overview }) {
  const counts = overview.devices || {}, all = Object.values(counts).reduce((sum, n) => sum + n, 0);
  const here = (counts.online || 0) + (counts.busy || 0), oldest = overview.oldest_waiting;
  return html`<${Section} title=${t("fleet")}><${Card} className="pad"><div class="figures">
    <a href=${link("devices")} class="figure"><b>${number(here)}</b><span>${t("devices_online", { all: number(all) })}</span></a>
    <div class="figure"><b>${number(overview.rates.completed_last_minute)}</b><span>${t("per_minute")}</span></div>
    <div class="figure"><b>${failureRate(overview.rates)}</b><span>${t("failed_last_hour")}</span></div>
    <div class="figure"><b>${oldest ? duration(oldest.waiting_seconds) : "–"}</b><span>${t("queue_age")}</span></div></div>
    ${oldest && html`<p class="quiet" id="oldest"><${TaskLink} id=${oldest.task_id} />: ${oldestWords(oldest)}</p>`}
    ${all > 0 && html`<${Meter} part=${here / all} label=${t("devices")} words=${t("of", { n: number(here), limit: number(all) })} level=${here === 0 ? "red" : ""} />`}
  </${Card}></${Section}>`;
}
const oldestWords = (oldest) => t("oldest", { age: duration(oldest.waiting_seconds), why: why(oldest) });
function failureRate(rates) {
  const ended = rates.completed_last_hour + rates.failed_last_hour;
  return ended ? percent(rates.failed_last_hour / ended, 1) : "–";
}

function Throughput() {
  const [hours, set] = useState(1);
  const path = `/system/series?hours=${hours}`;
  const { data } = useLive(path, hours === 1 ? 10000 : 60000);
  const points = data?.points || [];
  const per = (name) => points.map((point) => (point[name] * 60) / data.step_seconds);
  const choose = html`<div role="group" aria-label=${t("time_span")}>${[1, 24].map((n) => html`<button key=${n} type="button" class=${n === hours ? "main" : "plain"} aria-pressed=${n === hours} onClick=${() => set(n)}>${t(`last_${n}`)}</button>`)}
    <${CurlButton} path=${path} /></div>`;
  return html`<${Section} title=${t("throughput")} aside=${choose}><${Card} className="pad">${data ? html`<${Chart} key=${hours} label=${t("throughput")} at=${points.map((point) => point.at)} height=${220} series=${[
    { label: t("completed"), tone: "green", fill: true, values: per("completed"), digits: 1 },
    { label: t("failed"), tone: "red", values: per("failed"), digits: 1 },
    { label: t("lost_tasks"), tone: "violet", values: per("lost"), digits: 1 }]} />` : html`<${Waiting} lines=${6} />`}</${Card}></${Section}>`;
}
