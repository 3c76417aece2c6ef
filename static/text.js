/* How are words, numbers and times written for this viewer? */
import en from "./strings.en.js";
import zh from "./strings.zh.js";

const memory = {  // a browser may forbid storage; then the page just forgets
  get(name) { try { return localStorage.getItem(`af.${name}`); } catch { return null; } },
  set(name, value) { try { localStorage.setItem(`af.${name}`, value); } catch { /* forgotten */ } },
};
export { memory };
let words = en, locale = "en-GB", language = "en";

export const firstLanguage = () => memory.get("language") || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
export function useWords(wanted) {
  language = wanted;
  words = wanted === "zh" ? zh : en;
  locale = (navigator.languages || []).find((tag) => tag.toLowerCase().startsWith(wanted)) || (wanted === "zh" ? "zh-CN" : "en-GB");
  document.documentElement.lang = wanted === "zh" ? "zh-CN" : "en";
}
export const otherLanguage = () => (language === "zh" ? { code: "en", lang: "en", name: en.language } : { code: "zh", lang: "zh-CN", name: zh.language });

/** The words of a key, with {braces} filled in and {n|task|tasks} chosen: the first where n is "1". A key without words (a newer master's state) is shown as it is. */
export function t(key, values = {}) {
  return (Object.hasOwn(words, key) ? words[key] : String(key)).replace(/\{(\w+)\|([^|}]*)\|([^}]*)\}/g, (_, name, one, more) => (String(values[name]) === "1" ? one : more))
    .replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}
export const has = (key) => Object.hasOwn(words, key);

export const number = (n, digits = 0) => new Intl.NumberFormat(locale, { maximumFractionDigits: digits }).format(n ?? 0);
export const big = (n) => (Math.abs(n ?? 0) < 1e6 ? number(n) : new Intl.NumberFormat(locale.startsWith("zh") ? locale : "en", { notation: "compact", maximumFractionDigits: 2 }).format(n));
export const percent = (part, digits = 0) => (part === null || part === undefined ? "–" : new Intl.NumberFormat(locale, { style: "percent", maximumFractionDigits: digits }).format(part));
const unit = (n, name, digits = 0) => new Intl.NumberFormat(locale, { style: "unit", unit: name, unitDisplay: "narrow", maximumFractionDigits: digits }).format(n);
export const bytes = (n) => (n >= 1e9 ? unit(n / 1e9, "gigabyte", 1) : n >= 1e6 ? unit(n / 1e6, "megabyte", 1) : unit((n || 0) / 1e3, "kilobyte"));
/** 3ms, 0.25s, 42s, 5m 12s, 3h 20m, 2d 4h; `exact`: also parts of a second. */
export function duration(seconds, exact = false) {
  const whole = Math.max(0, Math.floor(seconds));
  if (exact && seconds < 0.1) return unit(seconds * 1000, "millisecond", seconds < 0.001 ? 1 : 0);
  if (exact && seconds < 10) return unit(seconds, "second", 2);
  for (const [size, name, small, smallName] of [[86400, "day", 3600, "hour"], [3600, "hour", 60, "minute"], [60, "minute", 1, "second"]]) {
    const rest = Math.floor((whole % size) / small);
    if (whole >= size) return unit(Math.floor(whole / size), name) + (rest ? ` ${unit(rest, smallName)}` : "");
  }
  return unit(whole, "second");
}
export function clock(at) {
  const moment = new Date(at);
  const today = moment.toDateString() === new Date().toDateString();
  return new Intl.DateTimeFormat(locale, today ? { timeStyle: "medium" } : { dateStyle: "medium", timeStyle: "short" }).format(moment);
}
export const hourMinute = (at, isExact = false) => new Intl.DateTimeFormat(locale, { hour: "2-digit", minute: "2-digit", ...(isExact && { second: "2-digit" }), hourCycle: "h23" }).format(new Date(at));
export const utc = (iso) => `${String(iso).replace("T", " ").replace("Z", "")} UTC`;
export const sentence = (text) => (text ? text[0].toUpperCase() + text.slice(1) + (/[.!?。!?)]$/.test(text) ? "" : ".") : "");

/** A waiting reason in the page's language where it has words for it, else the master's own sentence. */
export const why = (waiting) => (has(`why_${waiting.reason}`) ? t(`why_${waiting.reason}`) : sentence(waiting.detail || waiting.reason));
