/* How does work come in? One task by a form, or a great many from a file. */
import { html } from "../vendor/htm-preact.js";
import { useLive } from "../live.js";
import { link, NotFor, Section } from "../parts.js";
import { may } from "../session.js";
import { t } from "../text.js";
import { ManyTasks } from "./new_many.js";
import { OneTask } from "./new_one.js";

export function NewTasks({ values }) {
  const isMany = values.mode === "many";
  const { data: system } = useLive("/system", 60000);
  if (!may("submitter")) return html`<${Section} title=${t("nav_new")}><${NotFor} role="submitter" /></${Section}>`;
  return html`<${Section} title=${t("nav_new")} aside=${html`<nav class="chips" aria-label=${t("how_many")}>
      <a class="chip" href=${link("new")} aria-current=${isMany ? null : "page"}>${t("one_task")}</a><a class="chip" href=${link("new", null, { mode: "many" })} aria-current=${isMany ? "page" : null}>${t("many_tasks")}</a></nav>`}>
    ${isMany ? html`<${ManyTasks} />` : html`<${OneTask} key=${values.from || ""} from=${values.from || null} types=${system?.task_types} />`}</${Section}>`;
}
