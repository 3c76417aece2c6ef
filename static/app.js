/* Which view is shown? The address says it; here are the frame around the views, the key form and the banner. */
import { html, render, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { ask } from "./api.js";
import { ended, SESSION, signedIn, signOut, useConnection, useLive } from "./live.js";
import { Field, link, readAddress, Said, useTick, Waiting } from "./parts.js";
import { may, session } from "./session.js";
import { clock, duration, firstLanguage, has, memory, otherLanguage, t, useWords } from "./text.js";
import { Access } from "./views/access.js";
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
  overview: [Overview], tasks: [Tasks, Task], new: [NewTasks], batches: [Batches, Batch], devices: [Devices, Device], dispatch: [Dispatch], events: [Events], system: [System], access: [Access],
};
const NAV = [...["overview", "tasks", "batches", "devices", "dispatch", "events", "system"].map((name) => [name, "viewer"]), ["access", "admin"]];
const ASKED_AGAIN_MS = 60000;

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
  useLive(SESSION, ASKED_AGAIN_MS);  // the first question of all: what is offered depends on it
  const { view, id, values } = useAddress();
  const [whole, one] = VIEWS[view] || VIEWS.overview;
  const View = id !== null && one ? one : whole;
  const isSignedOut = connection.state === "signed_out", isKnown = session().role !== null;
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
      ${isKnown && html`<nav class="views" aria-label=${t("views")}>${NAV.map(([name, role]) => may(role) && html`<a key=${name} href=${link(name)} aria-current=${name === view ? "page" : null}>${t(`nav_${name}`)}</a>`)}
        ${may("submitter") && html`<a class="new" href=${link("new")} aria-current=${view === "new" ? "page" : null}>${t("nav_new")}</a>`}</nav>`}
      <div class="end"><${Connection} connection=${connection} />
        <button type="button" class="plain" lang=${other.lang} id="language" onClick=${speak}>${other.name}</button>
        ${isKnown && session().key_needed && html`<${Who} /><button type="button" class="plain" onClick=${leave}>${t("sign_out")}</button>`}</div>
    </header>
    <${Banner} connection=${connection} />
    <main id="main" tabindex="-1" class=${connection.state === "offline" ? "old" : ""}>
      ${isKnown ? html`<h1 class="unseen">${title}</h1><${View} key=${`${view} ${id}`} id=${id} values=${values} />` : isSignedOut ? html`<${KeyForm} />` : html`<${Waiting} lines=${8} />`}</main>
    ${isKnown && isSignedOut && html`<${Door}><${KeyForm} /></${Door}>`}
    <${Said} /></div>`;
}
const Who = () => html`<p class="who-am-i" title=${t(`about_role_${session().role}`)}><b>${session().name}</b> <span>${t(`role_${session().role}`)}</span></p>`;
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
  signOut();
}
/** Stands before a view whose session is over, and before its dialogs: what was typed there is there again afterwards. */
function Door({ children }) {
  const node = useRef(null);
  useEffect(() => node.current.showModal(), []);
  return html`<dialog class="door" ref=${node} aria-label=${t("key_title")} onClose=${() => node.current?.showModal()}>${children}</dialog>`;
}
function KeyForm() {
  const [problem, set] = useState("");
  const input = useRef(null);
  useEffect(() => input.current.focus(), []);
  const enter = async (event) => {
    event.preventDefault();
    try {
      await ask("/login", { method: "POST", body: { key: input.current.value } });
      await signedIn();
    } catch (error) {
      set(!error.status ? t("lost_first") : has(`login_${error.code}`) ? t(`login_${error.code}`) : error.message);
      input.current.select();
    }
  };
  return html`<form class="card key" id="key-form" onSubmit=${enter}><h1>${t("key_title")}</h1>
    ${ended && html`<p class="note amber" id="ended">${t(has(`ended_${ended}`) ? `ended_${ended}` : "ended_unauthorized")}</p>`}<p class="quiet">${t("key_help")}</p>
    <input name="username" autocomplete="username" value="api_key" hidden />
    <${Field} label=${t("key_label")} problem=${problem}><input name="key" type="password" autocomplete="current-password" required spellcheck=${false} ref=${input} /></${Field}>
    <button type="submit" class="main">${t("key_send")}</button></form>`;
}
render(html`<${App} />`, document.getElementById("app"));
