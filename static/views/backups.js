/* When was the database copied last, and where is it set up? Part of the system view. */
import { html, useState } from "../vendor/htm-preact.js";
import { useLive } from "../live.js";
import { Age, Card, CurlButton, Empty, Facts, Moment, Refusal, Section, Table, Waiting } from "../parts.js";
import { may } from "../session.js";
import { bytes, duration, number, t } from "../text.js";
import { actLong } from "./bulk.js";

const PATH = "/system/backups", SHOWN = 10;
const EXAMPLE = { backup_folder: "/mnt/backups/crawler" };

export function Backups() {
  const { data, problem } = useLive(PATH, 10000);
  const [isAsked, ask] = useState(false), isBusy = isAsked || data?.is_running;
  const make = async () => {
    ask(true);
    await actLong("/system/backup", {}, (made) => t("backup_made", { name: made.name, size: bytes(made.bytes) }));
    ask(false);
  };
  const aside = html`<div>${data?.folder && may("admin") && html`<button type="button" class="plain" disabled=${isBusy} onClick=${make}>${t(isBusy ? "backup_running" : "backup_now")}</button>`}<${CurlButton} path=${PATH} /></div>`;
  return html`<${Section} title=${t("backups")} aside=${aside}><${Refusal} problem=${problem} />
    ${!data ? !problem && html`<${Card}><${Waiting} /></${Card}>` : !data.folder ? html`<${Card}><${Empty}><p>${t("no_backup_folder")}</p><pre tabindex="0">${JSON.stringify(EXAMPLE, null, 2)}</pre><p>${t("no_backup_more")}</p></${Empty}></${Card}>` : html`<${Made} data=${data} />`}</${Section}>`;
}
function Made({ data }) {
  const [newest] = data.backups;
  return html`${data.last_failure && html`<p class="note red" role="alert">${t("backup_failed", { reason: data.last_failure })}</p>`}
    <${Card} className="pad"><${Facts} facts=${[[t("last_backup"), newest ? html`<${Age} at=${newest.at} />` : t("never")], [t("size"), newest && bytes(newest.bytes)],
      [t("backup_folder"), data.folder], [t("backup_daily"), data.daily_at], [t("backup_keep"), number(data.keep)]]} /></${Card}>
    ${newest && html`<${Table} label=${t("backups")} rows=${data.backups.slice(0, SHOWN)} keyOf=${(one) => one.name} columns=${[
      { name: "at", label: t("time"), cell: (one) => html`<${Moment} at=${one.at} />` },
      { name: "name", label: t("backup_name"), cell: (one) => html`<code>${one.name}</code>` },
      { name: "size", label: t("size"), cell: (one) => bytes(one.bytes) },
      { name: "files", label: t("backup_files"), cell: (one) => number(one.files) },
      { name: "took", label: t("duration"), cell: (one) => duration(one.seconds, true) }]} />`}`;
}
