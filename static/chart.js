/* How is a time series drawn? uPlot on a canvas, in the page's colours, with a sentence for those who cannot see it. */
import { html, useEffect, useRef } from "./vendor/htm-preact.js";
import { clock, hourMinute, number, t } from "./text.js";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const scheme = matchMedia("(prefers-color-scheme: dark)");

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
        width: Math.max(120, holder.current.clientWidth), height, padding: [8, 8, 0, 0], cursor: { y: false, drag: { setScale: false, x: false, y: false } },
        scales: { y: { range: (_, __, most) => [0, top ?? Math.max(1, most * 1.1)] } },
        axes: [{ ...axis, values: (_, moments) => moments.map((moment) => hourMinute(moment * 1000)), space: 60 },
          { ...axis, size: 52, values: (_, marks) => marks.map((mark) => number(mark, 2)) }],
        series: [{ label: t("time"), value: (_, moment) => (moment === null ? "–" : clock(moment * 1000)) },
          ...series.map((one) => ({ label: one.label, stroke: colour(one.tone), fill: one.fill ? colour(`${one.tone}-soft`) : undefined, width: 2, points: { show: false },
            value: (_, value) => (value === null || value === undefined ? "–" : number(value, one.digits ?? 0)) }))],
      }, data, holder.current);
    };
    make();
    const watch = new ResizeObserver(() => drawn.current?.setSize({ width: Math.max(120, holder.current.clientWidth), height }));
    watch.observe(holder.current);
    scheme.addEventListener("change", make);
    return () => { watch.disconnect(); scheme.removeEventListener("change", make); drawn.current?.destroy(); drawn.current = null; };
  }, [shape]);
  useEffect(() => { drawn.current?.setData(data); }, [at, ...series.map((one) => one.values)]);
  const newest = series.map((one) => `${one.label}: ${number(one.values.filter((value) => value !== null).at(-1) ?? 0, one.digits ?? 0)}`).join(", ");
  return html`<figure class="chart"><div ref=${holder} role="img" aria-label=${`${label}. ${newest}`} /></figure>`;
}
