/* What can be said of one device, and what can be done with it? The list of devices and the page of one both use it. */
import { html, useState } from "../vendor/htm-preact.js";
import { act, Dialog, Field, Meter, Spark, SureButton } from "../parts.js";
import { may } from "../session.js";
import { duration, has, number, percent, t } from "../text.js";

const CLOCK_SKEW_SHOWN = 30;  // seconds
export const STATUSES = ["online", "busy", "draining", "conflict", "off", "stopped", "disabled"];

export const devicePath = (id) => `/devices/${encodeURIComponent(id)}`;
export const nameOf = (device) => device.device_name || device.device_id;
/** Offline is two things to people: stopped in good order, or off and nobody knows why. */
export const statusOf = (device) => (device.status !== "offline" ? device.status : device.has_stopped ? "stopped" : "off");
export const isAway = (device) => device.status === "offline";

/** What a device says of itself, or its clock and its failures say of it; a word that a newer device sends is shown as it is. */
export function troubles(device) {
  if (isAway(device)) return [];  // what it said before is over
  const skew = device.clock_skew_seconds ?? 0;
  return [
    device.status === "conflict" && `${t("about_conflict")}.`,
    device.problem && (has(`problem_${device.problem}`) ? t(`problem_${device.problem}`) : device.problem),
    device.one_at_a_time && device.problem !== "failing" && t("problem_failing"),
    Math.abs(skew) > CLOCK_SKEW_SHOWN && t(skew > 0 ? "clock_ahead" : "clock_behind", { age: duration(Math.abs(skew)) }),
  ].filter(Boolean);
}
export const Troubles = ({ device }) => troubles(device).map((words) => html`<span key=${words} class=${`trouble ${device.status === "conflict" ? "red-text" : "amber-text"}`}>${words}</span>`);

/** The part that it completed of all that it ended, or null. */
export function successRate(device) {
  const ended = device.completed_count + device.failed_count + device.lost_count;
  return ended ? device.completed_count / ended : null;
}
export const rateWords = (rate) => percent(rate, rate > 0.99 && rate < 1 ? 1 : 0);

/** A device queues only when its slots are taken, so what is over their number waits there. */
export function Load({ device }) {
  const slots = device.max_concurrent_tasks || 0, held = device.assigned_count ?? 0, busy = Math.min(held, slots);
  const words = t("of", { n: number(busy), limit: number(slots) });
  return html`<${Meter} part=${slots ? busy / slots : 0} label=${t("load")} words=${held > slots ? `${words} ${t("queued", { n: number(held - slots) })}` : words} />`;
}
/** The newest figure and the way that it took; nothing of a device that is away: an old figure misleads. */
export function Usage({ device, name, beats }) {
  const used = device[`${name}_usage`];
  if (typeof used !== "number" || isAway(device)) return html`<span class="usage" title=${t("unknown")}>–</span>`;
  const level = used >= 95 ? "red" : used >= 85 ? "amber" : "";
  return html`<span class=${`usage ${level}`}><span class=${level && `${level}-text`}>${Math.round(used)}%</span>
    <${Spark} values=${(beats || []).map((beat) => beat[name])} top=${100} label=${t("percent", { name: t(name), n: Math.round(used) })} /></span>`;
}

// ---- Changing it ----------------------------------------------------------------------------------------------------
/** Active, draining or disabled; taking it back puts the reason back too. Only a conflict that was ended stays ended. */
function want(device, status, reason = null) {
  const back = { ...device, status: "", wanted: status, wanted_reason: reason };
  return act(`${devicePath(device.device_id)}/status`, {
    method: "PUT", body: { status, reason: reason || null }, done: t(`now_${status}`, { device: nameOf(device) }),
    undo: device.status === "conflict" || device.wanted === status ? null : () => want(back, device.wanted, device.wanted_reason),
  });
}
function rename(device, name) {
  return act(devicePath(device.device_id), {
    method: "PUT", body: { device_name: name || null }, done: (answer) => t("now_renamed", { device: device.device_id, name: answer.device_name }),
    undo: () => rename({ ...device, device_name: name }, device.device_name),
  });
}
const remove = (device, onGone) => act(devicePath(device.device_id), {
  method: "DELETE", body: undefined, done: () => { onGone?.(); return t("now_removed", { device: nameOf(device) }); },
});

/** The likeliest change as a button, and all of them behind another one. */
export function DeviceActions({ device, onGone }) {
  const [isOpen, open] = useState(false);
  const isActive = device.wanted === "active" && device.status !== "conflict";
  const label = (words) => `${words}: ${nameOf(device)}`;
  if (!may("operator")) return null;
  return html`<span class="row">
    <button type="button" class="plain" aria-label=${label(t(isActive ? "drain" : "activate"))} onClick=${() => want(device, isActive ? "draining" : "active")}>${t(isActive ? "drain" : "activate")}</button>
    <button type="button" class="plain" aria-label=${label(t("change"))} aria-haspopup="dialog" onClick=${() => open(true)}>${t("change")}</button>
    ${isOpen && html`<${ChangeDialog} device=${device} onGone=${onGone} onClose=${() => open(false)} />`}</span>`;
}
function ChangeDialog({ device, onGone, onClose }) {
  const [reason, setReason] = useState(device.wanted_reason || "");
  const [name, setName] = useState(nameOf(device));
  const then = (change) => () => { change(); onClose(); };
  const states = ["active", "draining", "disabled"].filter((status) => status !== device.wanted || device.status === "conflict");
  return html`<${Dialog} title=${t("change_device", { device: nameOf(device) })} onClose=${onClose} className="change">
    <form onSubmit=${(event) => { event.preventDefault(); then(() => want(device, event.submitter.value, reason.trim()))(); }}>
      <${Field} label=${t("reason")} help=${t("reason_help")}><input value=${reason} maxLength="200" onInput=${(event) => setReason(event.target.value)} /></${Field}>
      <div class="choices">${states.map((status) => html`<div key=${status}><button type="submit" value=${status} class="plain">${t(`want_${status}`)}</button><small class="quiet">${t(`want_${status}_help`)}</small></div>`)}</div></form>
    <form onSubmit=${(event) => { event.preventDefault(); then(() => rename(device, name.trim()))(); }}>
      <${Field} label=${t("device_name")} help=${t("device_name_help")}><input value=${name} maxLength="128" onInput=${(event) => setName(event.target.value)} /></${Field}>
      <div><button type="submit" class="plain">${t("rename")}</button></div></form>
    <div class="choices"><div><${SureButton} sure=${t("remove_sure")} onSure=${then(() => remove(device, onGone))}>${t("remove_device")}</${SureButton}><small class="quiet">${t("remove_help")}</small></div></div>
  </${Dialog}>`;
}
