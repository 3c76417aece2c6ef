/* Who has a key, for what, until when, and who used it last? Made here, shown once, and taken back. */
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { ask, now, query } from "../api.js";
import { enterBy, useLive } from "../live.js";
import { act, Age, Card, Command, CurlButton, DeviceLink, Dialog, Empty, Field, goWith, Moment, Pages, Pill, Refusal, SureButton, Table, useTick, Waiting } from "../parts.js";
import { LADDER, session } from "../session.js";
import { clock, duration, number, t, utc } from "../text.js";

const ROLES = [...LADDER, "enroll"];
const isOver = (at) => at !== null && Date.parse(at) <= now();
/** Why a key opens nothing any more, or "". */
const endOf = (key) => (key.revoked_at ? "revoked" : isOver(key.expires_at) ? "expired" : key.uses_left === 0 ? "used_up" : "");

/** When a key ends, counting down. */
export function Ends({ at }) {
  useTick();
  if (at === null) return html`<span>${t("no_end")}</span>`;
  return html`<time dateTime=${at} title=${utc(at)}>${isOver(at) ? clock(at) : t("ends", { time: clock(at), age: duration((Date.parse(at) - now()) / 1000) })}</time>`;
}
export const LastUse = ({ of }) => html`<span><${Age} at=${of.last_used_at} />${of.last_used_from && html`<span class="small">${t("used_from", { address: of.last_used_from })}</span>`}</span>`;
const revoke = (key) => act(`/keys/${key.id}`, { method: "DELETE", body: undefined, done: t("key_is_revoked", { name: key.name }) });
const isMine = (key) => key.name === session().name && key.role === session().role;

export function Keys({ values }) {
  const path = `/keys${query({ role: values.role, limit: 50, cursor: values.cursor })}`;
  const { data, problem } = useLive(path);
  const [isMaking, make] = useState(false), isOpen = !session().key_needed;
  return html`<div class="head"><select aria-label=${t("role")} value=${values.role || ""} onChange=${(event) => goWith({ role: event.target.value, cursor: "" })}>
      <option value="">${t("role")}: ${t("all")}</option>${[...ROLES, "device"].map((role) => html`<option key=${role} value=${role} selected=${role === values.role}>${t(`role_${role}`)}</option>`)}</select>
      <div><button type="button" class="main" aria-haspopup="dialog" onClick=${() => make(true)}>${t("make_key")}</button><${CurlButton} path=${path} /></div></div>
    ${isOpen ? html`<p class="note amber">${t("keys_open")}</p>` : html`<p class="quiet">${t(values.role === "device" ? "keys_of_devices" : "keys_help")}</p>`}
    <${Refusal} problem=${problem} />
    ${!data ? !problem && html`<${Waiting} lines=${6} />` : data.keys.length === 0 ? html`<${Card}><${Empty}><p>${t(values.role ? "no_keys_of_role" : "no_keys")}</p></${Empty}></${Card}>` : html`<${Table} label=${t("keys")} rows=${data.keys} keyOf=${(key) => key.id} columns=${COLUMNS()} />`}
    <${Pages} next=${data?.next_cursor} cursor=${values.cursor} />
    ${isMaking && html`<${NewKey} onClose=${() => make(false)} />`}`;
}
const COLUMNS = () => [
  { name: "name", label: t("key_name"), cell: (key) => html`<span><b>${key.name}</b><span class="small">#${key.id} ${isMine(key) && `· ${t("key_mine")}`}</span></span>` },
  { name: "role", label: t("role"), cell: (key) => html`<span title=${t(`about_role_${key.role}`)}>${t(`role_${key.role}`)}${key.device_id && html`<span class="small"><${DeviceLink} id=${key.device_id} /></span>`}</span>` },
  { name: "state", label: t("state"), cell: (key) => html`<${Pill} name=${endOf(key) ? "ended" : "open"}>${t(`key_${endOf(key) || "in_force"}`)}</${Pill}>${key.revoked_at && html`<span class="small"><${Moment} at=${key.revoked_at} /></span>`}` },
  { name: "used", label: t("last_used"), cell: (key) => html`<${LastUse} of=${key} />` },
  { name: "ends", label: t("key_ends"), cell: (key) => html`<span><${Ends} at=${key.expires_at} />${key.uses_left > 0 && html`<span class="small">${t("uses_left", { n: number(key.uses_left) })}</span>`}</span>` },
  { name: "created", label: t("created"), cell: (key) => html`<span><${Moment} at=${key.created_at} /><span class="small">${t("made_by", { name: key.created_by })}</span></span>` },
  { name: "do", label: t("actions"), cell: (key) => endOf(key) !== "revoked" && html`<${SureButton} label=${`${t("revoke")}: ${key.name}`} onSure=${() => revoke(key)} sure=${t(isMine(key) ? "revoke_mine_sure" : "revoke_sure")}>${t("revoke")}</${SureButton}>` },
];

/** Whoever makes the first one, before which nobody needed a key, is signed in with it, or would stand outside. */
function NewKey({ onClose }) {
  const [isFirst] = useState(!session().key_needed);
  const [form, set] = useState({ role: isFirst ? "admin" : "viewer", name: "", days: "", uses: "" }), [problem, refuse] = useState(null), [made, keep] = useState(null);
  const write = (name) => (event) => set({ ...form, [name]: event.target.value });
  const send = async (event) => {
    event.preventDefault();
    const body = { role: form.role };
    if (form.name.trim()) body.name = form.name.trim();
    if (form.days) body.days = Number(form.days);
    if (form.role === "enroll" && form.uses) body.uses = Number(form.uses);
    refuse(null);
    await enterBy(async () => {
      const answer = await act("/keys", { body, done: ({ name }) => t("key_is_made", { name }), refused: refuse });
      keep(answer);
      if (answer && isFirst) await ask("/login", { method: "POST", body: { key: answer.key } });
    }).catch(refuse);
  };
  const roles = isFirst ? ["admin"] : ROLES, isHere = (name) => problem?.field === name && problem.message;
  return html`<${Dialog} title=${t(made ? "key_shown_title" : "make_key")} onClose=${onClose} isFirm=${made !== null}>${made ? html`<${Shown} made=${made} isFirst=${isFirst} problem=${problem} />` : html`<form onSubmit=${send}>
    <${Field} label=${t("role")} help=${t(`about_role_${form.role}`)}><select name="role" value=${form.role} onChange=${write("role")}>${roles.map((role) => html`<option key=${role} value=${role} selected=${role === form.role}>${t(`role_${role}`)}</option>`)}</select></${Field}>
    <${Field} label=${t("key_name")} help=${t("key_name_help")} problem=${isHere("name")}><input name="name" value=${form.name} maxLength="128" autocomplete="off" onInput=${write("name")} /></${Field}>
    <${Field} label=${t("key_days")} help=${t(form.role === "enroll" ? "key_days_enroll" : "key_days_help")} problem=${isHere("days")}><input name="days" type="number" min="1" max="3650" value=${form.days} onInput=${write("days")} /></${Field}>
    ${form.role === "enroll" && html`<${Field} label=${t("key_uses")} help=${t("key_uses_help")} problem=${isHere("uses")}><input name="uses" type="number" min="1" max="100000" value=${form.uses} onInput=${write("uses")} /></${Field}>`}
    ${problem && !["name", "days", "uses"].some(isHere) && html`<${Refusal} problem=${problem} />`}
    <div class="row"><button type="submit" class="main">${t("make_key")}</button></div></form>`}</${Dialog}>`;
}
function Shown({ made, isFirst, problem }) {
  const node = useRef(null);
  useEffect(() => node.current.focus(), []);  // the form that had the focus is gone
  return html`<div class="stack" id="key-shown" tabindex="-1" ref=${node}><p>${t("key_shown", { name: made.name, role: t(`role_${made.role}`) })}</p>
    <${Command} text=${made.key} /><p class="note amber">${t("key_shown_once")}</p>${isFirst && !problem && html`<p>${t("key_shown_first")}</p>`}<${Refusal} problem=${problem} />
    <p class="quiet">${t("key_ends")}: <${Ends} at=${made.expires_at} />${made.uses_left && ` · ${t("uses_left", { n: number(made.uses_left) })}`}</p></div>`;
}
