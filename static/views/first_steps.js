/* What does a new master need first? A device, and a task. */
import { html } from "../vendor/htm-preact.js";
import { curl } from "../api.js";
import { Card, Command, hasKey, link, Section } from "../parts.js";
import { t } from "../text.js";

export function FirstSteps({ hasDevices, hasTasks, hasWorkerFile }) {
  return html`<${Section} title=${t("first_steps")}><div class="two">
    ${!hasDevices && html`<${Card} className="pad"><${AddDevice} hasWorkerFile=${hasWorkerFile} /></${Card}>`}
    ${!hasTasks && html`<${Card} className="pad"><${FirstTask} /></${Card}>`}</div></${Section}>`;
}
export const FirstTask = () => html`<div class="empty"><p>${t("no_tasks")}</p>
  <${Command} text=${curl("/tasks", { body: { task_type: "echo", task_data: { say: "hello" } }, needsKey: hasKey() })} />
  <p>${t("no_tasks_more")} <a href=${link("new")}>${t("nav_new")}</a></p></div>`;

/** The lines to paste on a new machine, with the master's address as this browser sees it. */
export function AddDevice({ hasWorkerFile, isFirst = true }) {
  const url = location.origin, isLoopback = /^(localhost|127\..*|\[::1\])$/.test(location.hostname);
  const key = hasKey() ? "AF_API_KEY=YOUR_KEY " : "", flags = `--device-id shop-7 --master-url "${url}"`;
  const windowsKey = hasKey() ? '$env:AF_API_KEY = "YOUR_KEY"; ' : "";
  // The quotes and -g are for an IPv6 address in brackets, which shells and curl would take for a pattern.
  const unix = hasWorkerFile ? `curl -fsSgO "${url}/edge/worker.pyz" && ${key}python3 worker.pyz ${flags}` : `${key}python worker.py ${flags}`;
  return html`<div class="empty" id="add-panel">${isFirst && html`<p>${t("no_devices")}</p>`}
    <p>${t(hasWorkerFile ? "add_one_line" : "add_not_built")}</p>
    ${hasWorkerFile && html`<p>${t("add_unix")}</p>`}<${Command} text=${unix} />
    ${hasWorkerFile && html`<p>${t("add_windows")}</p><${Command} text=${`Invoke-WebRequest -UseBasicParsing "${url}/edge/worker.pyz" -OutFile worker.pyz; ${windowsKey}py worker.pyz ${flags}`} />`}
    ${hasKey() && html`<p>${t("add_key")}</p>`}${isLoopback && html`<p class="note amber">${t("add_loopback")}</p>`}<p>${t("add_more")}</p></div>`;
}
