/* Who may come in, and what did they do? Keys, and the log of what was done with them. */
import { html } from "../vendor/htm-preact.js";
import { link, NotFor, Section } from "../parts.js";
import { may } from "../session.js";
import { t } from "../text.js";
import { Audit } from "./audit.js";
import { Keys } from "./keys.js";

export function Access({ values }) {
  if (!may("admin")) return html`<${Section} title=${t("nav_access")}><${NotFor} role="admin" /></${Section}>`;
  const isAudit = values.show === "audit";
  return html`<${Section} title=${t("nav_access")} aside=${html`<nav class="chips" aria-label=${t("nav_access")}>
      <a class="chip" href=${link("access")} aria-current=${isAudit ? null : "page"}>${t("keys")}</a><a class="chip" href=${link("access", null, { show: "audit" })} aria-current=${isAudit ? "page" : null}>${t("audit")}</a></nav>`}>
    ${isAudit ? html`<${Audit} values=${values} />` : html`<${Keys} values=${values} />`}</${Section}>`;
}
