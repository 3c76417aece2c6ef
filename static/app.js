/* Which view is shown? The address says it; here are the frame around the views, the key form and the banner. */
import { html, render, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { ask } from "./api.js";
import { signedIn, signOut, useConnection } from "./live.js";
import { Field, hasKey, link, readAddress, Said, useTick } from "./parts.js";
import { clock, duration, firstLanguage, memory, otherLanguage, t, useWords } from "./text.js";
import { Batch, Batches } from "./views/batches.js";
import { Device } from "./views/device.js";
import { Devices } from "./views/devices.js";
import { Dispatch } from "./views/dispatch.js";
import { Events } from "./views/events.js";
import { NewTasks } from "./views/new.js";
import { Overview } from "./views/overview.js";
import { System } from "./views/system.js";
import { Task } from "./views/task.js";
import { Tasks } from "./views/tasks.js";

const VIEWS = {  // name: [the whole, one of them]
  overview: [Overview], tasks: [Tasks, Task], new: [NewTasks], batches: [Batches, Batch], devices: [Devices, Device], dispatch: [Dispatch], events: [Events], system: [System],
};
const NAV = ["overview", "tasks", "batches", "devices", "dispatch", "events", "system"];

function useAddress() {
  const [address, set] = useState(readAddress);
  useEffect(() => {
    const read = () => set(readAddress());
    addEventListener("hashchange", read);
    return () => removeEventListener("hashchange", read);
  }, []);
  return address;
}

function App() {
  const [language, setLanguage] = useState(firstLanguage);
  useWords(language);
  const connection = useConnection();
  const { view, id, values } = useAddress();
  const [whole, one] = VIEWS[view] || VIEWS.overview;
  const View = id !== null && one ? one : whole;
  const isSignedOut = connection.state === "signed_out";
  const title = id !== null ? id : t(VIEWS[view] ? `nav_${view}` : "nav_overview");
  useEffect(() => { document.title = `${title} · ${t("title")}`; }, [title, language]);
  const shown = useRef(null);
  useEffect(() => {
    scrollTo(0, 0);
    document.querySelector(".views [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });  // a phone shows some of them
    // The link that was followed is gone with its view: who reads with the keyboard goes on at the new one.
    if (shown.current !== null && document.activeElement === document.body) document.getElementById("main").focus();
    shown.current = view;
  }, [view, id]);
  const other = otherLanguage();
  const speak = () => { memory.set("language", other.code); setLanguage(other.code); };
  return html`<div key=${language}>
    <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); document.getElementById("main").focus(); }}>${t("skip")}</a>
    <header class="top">
      <a class="brand" href="#/"><img src="/static/icon.svg" alt="" width="28" height="28" /><span>${t("title")}</span></a>
      ${!isSignedOut && html`<nav class="views" aria-label=${t("views")}>${NAV.map((name) => html`<a key=${name} href=${link(name)} aria-current=${name === view ? "page" : null}>${t(`nav_${name}`)}</a>`)}
        <a class="new" href=${link("new")} aria-current=${view === "new" ? "page" : null}>${t("nav_new")}</a></nav>`}
      <div class="end"><${Connection} connection=${connection} />
        <button type="button" class="plain" lang=${other.lang} id="language" onClick=${speak}>${other.name}</button>
        ${!isSignedOut && hasKey() && html`<button type="button" class="plain" onClick=${leave}>${t("sign_out")}</button>`}</div>
    </header>
    <${Banner} connection=${connection} />
    <main id="main" tabindex="-1" class=${connection.state === "offline" ? "old" : ""}>
      ${isSignedOut ? html`<${KeyForm} />` : html`<h1 class="unseen">${title}</h1><${View} key=${`${view} ${id}`} id=${id} values=${values} />`}</main>
    <${Said} /></div>`;
}
const Connection = ({ connection }) => html`<p id="connection" class=${`connection ${connection.state}`}><i class="dot" aria-hidden="true" />${t(connection.state)}</p>`;
function Banner({ connection }) {
  useTick();
  const isLost = connection.state === "offline";
  const at = connection.lostAt;
  return html`<div class="banner" id="banner" role="status" hidden=${!isLost}>${isLost && html`<span>${connection.detail ? t("unwell", { detail: connection.detail }) : at ? t("lost", { time: clock(at) }) : t("lost_first")}</span>
    ${at && html` <span>${t("lost_for", { age: duration((Date.now() - at) / 1000) })}</span>`}`}</div>`;
}
async function leave() {
  await ask("/logout", { method: "POST", body: {} }).catch(() => {});
  memory.set("signed_in", "no");
  signOut();
}
function KeyForm() {
  const [problem, set] = useState("");
  const input = useRef(null);
  useEffect(() => input.current.focus(), []);
  const enter = async (event) => {
    event.preventDefault();
    try {
      await ask("/login", { method: "POST", body: { key: input.current.value } });
      memory.set("signed_in", "yes");
      signedIn();
    } catch (error) {
      set([401, 403].includes(error.status) ? t("key_wrong") : error.status ? error.message : t("lost_first"));
      input.current.select();
    }
  };
  return html`<form class="card key" id="key-form" onSubmit=${enter}><h1>${t("key_title")}</h1><p class="quiet">${t("key_help")}</p>
    <input name="username" autocomplete="username" value="api_key" hidden />
    <${Field} label=${t("key_label")} problem=${problem}><input name="key" type="password" autocomplete="current-password" required spellcheck=${false} ref=${input} /></${Field}>
    <button type="submit" class="main">${t("key_send")}</button></form>`;
}
render(html`<${App} />`, document.getElementById("app"));
