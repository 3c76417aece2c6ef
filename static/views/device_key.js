/* With which key does this device come in, and how is it kept out? Part of a device's own page. */
import { html } from "../vendor/htm-preact.js";
import { query } from "../api.js";
import { useLive } from "../live.js";
import { act, Card, CurlButton, Facts, Moment, Section, SureButton } from "../parts.js";
import { may, session } from "../session.js";
import { number, t } from "../text.js";
import { devicePath, nameOf } from "./device_parts.js";
import { LastUse } from "./keys.js";

const revoke = (device) => act(`${devicePath(device.device_id)}/revoke`, { done: ({ tasks }) => t("device_is_revoked", { device: nameOf(device), n: number(tasks) }) });

/** Only an admin sees the key; an operator may revoke it all the same. */
export function DeviceKey({ device }) {
  const path = `/keys${query({ device_id: device.device_id })}`;
  const { data } = useLive(may("admin") && session().key_needed ? path : null);
  if (!session().key_needed || !may("operator") || (may("admin") && !data)) return null;
  const tokens = data?.keys.filter((key) => !key.revoked_at), [token] = tokens || [];
  const button = html`<${SureButton} onSure=${() => revoke(device)} sure=${t("revoke_device_sure")}>${t("revoke_device")}</${SureButton}>`;
  return html`<${Section} title=${t("device_key")} aside=${html`<div>${button}${may("admin") && html`<${CurlButton} path=${path} />`}</div>`}><${Card} className="pad stack">
    ${token && html`<${Facts} facts=${[[t("created"), html`<${Moment} at=${token.created_at} />`], [t("made_with"), token.created_by], [t("last_used"), html`<${LastUse} of=${token} />`]]} />`}
    <p class="quiet">${t(tokens && !token ? "device_no_key" : "revoke_device_help")}</p></${Card}></${Section}>`;
}
