/* What does a new master need first? A device, and a task. */
import { html, useState } from "../vendor/htm-preact.js";
import { curl } from "../api.js";
import { act, Card, Command, Field, link, Section } from "../parts.js";
import { may, session } from "../session.js";
import { t } from "../text.js";
import { Ends } from "./keys.js";

const DEVICE_ID = "[A-Za-z0-9_.\\-]{1,64}", NO_ID = "shop-7", NO_KEY = "YOUR_KEY";

export function FirstSteps({ hasDevices, hasTasks, hasWorkerFile }) {
  return html`<${Section} title=${t("first_steps")}><div class="two">
    ${!hasDevices && html`<${Card} className="pad"><${AddDevice} hasWorkerFile=${hasWorkerFile} /></${Card}>`}
    ${!hasTasks && html`<${Card} className="pad"><${FirstTask} /></${Card}>`}</div></${Section}>`;
}
export const FirstTask = () => html`<div class="empty">${may("submitter") ? html`<p>${t("no_tasks")}</p>
  <${Command} text=${curl("/tasks", { body: { task_type: "echo", task_data: { say: "hello" } } })} />
  <p>${t("no_tasks_more")} <a href=${link("new")}>${t("nav_new")}</a></p>` : html`<p>${t("no_tasks_yet")}</p>`}</div>`;

/** The lines to paste on a new machine, with the master's address as this browser sees it. An admin puts a key into them
    that registers one device; it is gone from the page with this panel. */
export function AddDevice({ hasWorkerFile, isFirst = true }) {
  const [id, setId] = useState(NO_ID), [made, make] = useState(null), [problem, refuse] = useState(null);
  const url = location.origin, isLoopback = /^(localhost|127\..*|\[::1\])$/.test(location.hostname), needsKey = session().key_needed;
  const isId = new RegExp(`^${DEVICE_ID}$`).test(id), flags = `--device-id ${isId ? id : NO_ID} --master-url "${url}"`;
  // In the environment of the program: arguments are what every user of a machine can read of it.
  const key = needsKey ? `AF_API_KEY=${made?.key || NO_KEY} ` : "", windowsKey = needsKey ? `$env:AF_API_KEY = "${made?.key || NO_KEY}"; ` : "";
  // The quotes and -g are for an IPv6 address in brackets, which shells and curl would take for a pattern.
  const unix = hasWorkerFile ? `curl -fsSgO "${url}/edge/worker.pyz" && ${key}python3 worker.pyz ${flags}` : `${key}python worker.py ${flags}`;
  const enroll = async (event) => {
    event.preventDefault();
    refuse(null);
    make(await act("/keys", { body: { role: "enroll", name: id, uses: 1 }, done: t("enroll_key_made", { device: id }), refused: refuse }));
  };
  return html`<div class="empty" id="add-panel">${isFirst && html`<p>${t("no_devices")}</p>`}
    ${needsKey && may("admin") && html`<form class="row enroll" onSubmit=${enroll}><${Field} label=${t("new_device_id")} problem=${problem?.message}><input name="device_id" value=${id} required pattern=${DEVICE_ID} title=${t("form_type")} spellcheck=${false} autocomplete="off" onInput=${(event) => setId(event.target.value)} /></${Field}>
      <button type="submit" class="main">${t(made ? "enroll_again" : "enroll")}</button></form>`}
    <p>${t(hasWorkerFile ? "add_one_line" : "add_not_built")}</p>
    ${hasWorkerFile && html`<p>${t("add_unix")}</p>`}<${Command} text=${unix} />
    ${hasWorkerFile && html`<p>${t("add_windows")}</p><${Command} text=${`Invoke-WebRequest -UseBasicParsing "${url}/edge/worker.pyz" -OutFile worker.pyz; ${windowsKey}py worker.pyz ${flags}`} />`}
    ${made && html`<p class="note green" role="status">${t("enroll_key_shown")} <${Ends} at=${made.expires_at} /></p>`}
    ${needsKey && !made && html`<p>${t(may("admin") ? "add_key" : "add_key_ask")}</p>`}${isLoopback && html`<p class="note amber">${t("add_loopback")}</p>`}<p>${t("add_more")}</p></div>`;
}
