/* What does the fleet do, and what needs a person now? */
import { html, useState } from "../vendor/htm-preact.js";
import { now } from "../api.js";
import { Chart, settledPoints } from "../chart.js";
import { useLive } from "../live.js";
import { Card, CurlButton, DeviceLink, Empty, Icon, link, Refusal, Section, STATES, TaskLink, tone, Waiting } from "../parts.js";
import { big, bytes, duration, has, number, percent, sentence, t, why } from "../text.js";
import { FirstSteps } from "./first_steps.js";

export function Overview() {
  const { data: overview, problem } = useLive("/system/overview");
  const [hours, choose] = useState(1);
  const path = `/system/series?hours=${hours}`;
  const { data: series } = useLive(path, hours === 1 ? 10000 : 60000);  // asked here: it need not wait for the counts
  if (!overview) return problem ? html`<${Refusal} problem=${problem} />` : html`<${Waiting} />`;
  const total = STATES.reduce((sum, name) => sum + (overview.tasks[name] || 0), 0);
  const devices = Object.values(overview.devices || {}).reduce((sum, n) => sum + n, 0);
  return html`<${Section} title=${t("states")} aside=${html`<div><${CurlButton} path="/system/overview" /></div>`}>
      <${Tiles} counts=${overview.tasks} total=${total} />
      <p class="quiet">${t("about", { mode: overview.mode, version: overview.version, uptime: duration(overview.uptime_seconds), strategy: has(`strategy_${overview.strategy}`) ? t(`strategy_${overview.strategy}`) : overview.strategy, database: bytes(overview.database_bytes) })}</p>
    </${Section}>
    ${(devices === 0 || total === 0) && html`<${FirstSteps} hasDevices=${devices > 0} hasTasks=${total > 0} hasWorkerFile=${overview.has_worker_file} />`}
    <div class="two"><${Attention} overview=${overview} /><${Fleet} overview=${overview} /></div>
    <${Throughput} data=${series} path=${path} hours=${hours} choose=${choose} />`;
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
      <p>${item.kind === "oldest_waiting" && overview.oldest_waiting ? oldestWords(overview.oldest_waiting) : itemWords(item)} <${About} item=${item} /></p></li>`)}</ul>`}
  </${Card}></${Section}>`;
}
/** In the page's language where it has words for it, else the master's own sentence. */
const itemWords = (item) => (has(`why_attention_${item.kind}`) ? t(`why_attention_${item.kind}`, { n: number(item.n), names: item.ids.map((id) => (id === "all" ? t("pause_all") : id)).join(", ") }) : sentence(item.detail));
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
    ${["hour", "day"].map((span) => html`<div key=${span} class="figure"><b>${failureRate(overview.rates, span)}</b><span>${t(`failed_last_${span}`)}</span></div>`)}
    <div class="figure"><b>${oldest ? duration(oldest.waiting_seconds) : "–"}</b><span>${t("queue_age")}</span></div></div>
    ${oldest && html`<p class="quiet" id="oldest"><${TaskLink} id=${oldest.task_id} />: ${oldestWords(oldest)}</p>`}
  </${Card}></${Section}>`;
}
const oldestWords = (oldest) => t("oldest", { age: duration(oldest.waiting_seconds), why: why(oldest) });
function failureRate(rates, span) {
  const failed = rates[`failed_last_${span}`], ended = rates[`completed_last_${span}`] + failed;
  return ended ? percent(failed / ended, 1) : "–";
}

function Throughput({ data, path, hours, choose }) {
  const points = settledPoints(data?.points || [], (point) => point.at);
  const seconds = (point) => Math.max(60, Math.min(data.step_seconds, (now() - Date.parse(point.at)) / 1000));  // the last step is not over
  const per = (name) => points.map((point) => (point[name] * 60) / seconds(point));
  const aside = html`<div role="group" aria-label=${t("time_span")}>${[1, 24].map((n) => html`<button key=${n} type="button" class=${n === hours ? "main" : "plain"} aria-pressed=${n === hours} onClick=${() => choose(n)}>${t(`last_${n}`)}</button>`)}
    <${CurlButton} path=${path} /></div>`;
  return html`<${Section} title=${t("throughput")} aside=${aside}><${Card} className="pad">${data ? html`<${Chart} key=${hours} label=${t("throughput")} at=${points.map((point) => point.at)} height=${220} series=${[
    { label: t("completed"), tone: "green", fill: true, values: per("completed"), digits: 1 },
    { label: t("failed"), tone: "red", values: per("failed"), digits: 1 },
    { label: t("lost_tasks"), tone: "violet", values: per("lost"), digits: 1 }]} />` : html`<${Waiting} lines=${6} />`}</${Card}></${Section}>`;
}
