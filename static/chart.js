/* How is a time series drawn? uPlot on a canvas, in the page's colours, with a sentence for those who cannot see it. */
import { html, useEffect, useRef } from "./vendor/htm-preact.js";
import { now } from "./api.js";
import { clock, hourMinute, number, t } from "./text.js";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const scheme = matchMedia("(prefers-color-scheme: dark)");

const newestOf = (values) => values.findLast((value) => value !== null);
/** A value between two gaps is no line: it gets a dot. */
const lonely = (plot, n) => plot.data[n].flatMap((value, i, all) => (value !== null && (all[i - 1] ?? null) === null && (all[i + 1] ?? null) === null ? [i] : []));
/** The points of a chart of what was done in each step, without the last one while less than a minute of it has gone by: it would look like a fall. */
export function settledPoints(points, momentOf) {
  const before = points.slice(0, -1), isYoung = points.length > 0 && now() - Date.parse(momentOf(points.at(-1))) < 60000;
  return isYoung && before.some((point) => point.completed || point.failed || point.lost) ? before : points;
}

/** at: moments (ISO or ms), oldest first; series: [{label, values, tone, fill?, digits?}]; top: the end of the axis, if it is fixed. */
export function Chart({ at, series, label, height = 180, top = null }) {
  const holder = useRef(null), drawn = useRef(null);
  const data = [at.map((moment) => (typeof moment === "number" ? moment : Date.parse(moment)) / 1000), ...series.map((one) => one.values)];
  const shape = `${series.map((one) => one.label).join("|")} ${document.documentElement.lang} ${height} ${top}`;
  useEffect(() => {
    const make = () => {
      drawn.current?.destroy();
      const axis = { stroke: colour("quiet"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
      drawn.current = new uPlot({
        width: Math.max(120, holder.current.clientWidth), height, padding: [8, 20, 0, 0], cursor: { y: false, drag: { setScale: false, x: false, y: false } },
        scales: { y: { range: (_, __, most) => [0, top ?? Math.max(1, most * 1.1)] } },
        axes: [{ ...axis, size: 32, values: (_, moments) => moments.map((moment) => hourMinute(moment * 1000, moments[1] - moments[0] < 60)), space: 70 },
          { ...axis, size: 52, values: (_, marks) => marks.map((mark) => number(mark, 2)) }],
        series: [{ label: t("time"), value: (plot, moment) => { const at = moment ?? plot.data[0].at(-1); return at === undefined ? "–" : clock(at * 1000); } },
          ...series.map((one) => ({ label: one.label, stroke: colour(one.tone), fill: one.fill ? colour(`${one.tone}-soft`) : undefined, width: 2, points: { show: true, size: 5, filter: lonely },
            value: (plot, value, n, i) => { const shown = i === null ? newestOf(plot.data[n]) : value; return shown === null || shown === undefined ? "–" : number(shown, one.digits ?? 0); } }))],
      }, data, holder.current);
    };
    make();
    const watch = new ResizeObserver(() => drawn.current?.setSize({ width: Math.max(120, holder.current.clientWidth), height }));
    watch.observe(holder.current);
    scheme.addEventListener("change", make);
    return () => { watch.disconnect(); scheme.removeEventListener("change", make); drawn.current?.destroy(); drawn.current = null; };
  }, [shape]);
  useEffect(() => { drawn.current?.setData(data); }, [at, ...series.map((one) => one.values)]);
  const newest = series.map((one) => `${one.label}: ${number(newestOf(one.values), one.digits ?? 0)}`).join(", ");
  return html`<figure class="chart"><div ref=${holder} role="img" aria-label=${`${label}. ${newest}`} /></figure>`;
}
