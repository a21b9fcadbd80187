// Predictions against measurements: KL, and seconds where maps were timed.

import { h, labelled, panel, put, select } from "./dom.js";
import { digits, kl, seconds } from "./format.js";
import { KINDS } from "./front.js";
import { axis, figure, plain } from "./plot.js";
import { color } from "./theme.js";

const KL = {
  name: "KL",
  predicted: (p) => p.predicted_kl,
  measured: (p) => p.kl,
  title: "KL, nats per token",
  scale: 1,
  log: true,
  show: kl,
};
const timed = (p) => p.times === "measured"; // else the API's seconds are the prediction
const PHASES = [
  {
    name: "decode latency",
    predicted: (p) => p.predicted_decode_s,
    measured: (p) => timed(p) && p.decode_s,
    title: "a generated token, ms",
    scale: 1e-3,
    show: seconds,
  },
  {
    name: "prefill latency",
    predicted: (p) => p.predicted_prefill_s,
    measured: (p) => timed(p) && p.prefill_s,
    title: "a prompt, ms",
    scale: 1e-3,
    show: seconds,
  },
];
const both = (what) => (p) => what.predicted(p) > 0 && what.measured(p) > 0;

/** The panel; points on the diagonal were predicted exactly. */
export function predictionPanel(state) {
  const view = { what: KL };
  const controls = h("div", { class: "controls" });
  const box = figure("Predicted against measured values, point by point", state.signal);
  const note = h("p", { class: "muted" });
  const section = panel("Predicted against measured", { wide: false, id: "prediction" }, controls, box, note);
  const draw = () => {
    const points = state.front.points.filter(both(view.what));
    box.hidden = !points.length;
    note.textContent = points.length
      ? summary(points, view.what)
      : "Nothing was both predicted and measured yet.";
    if (points.length) box.draw(() => drawing(points, view.what));
  };
  state.on(["front"], () => {
    const there = [KL, ...PHASES.filter((phase) => state.front.points.some(both(phase)))];
    put(
      controls,
      there.length > 1
        ? labelled(
            "Of",
            select(
              there.map((w) => w.name),
              view.what.name,
              (name) => ((view.what = there.find((w) => w.name === name)), draw()),
            ),
          )
        : null,
    );
    draw();
  });
  return section;
}

/** How far predictions are off, in words. */
function summary(points, what) {
  const off = points.map((p) => Math.abs(what.predicted(p) / what.measured(p) - 1)).sort((a, b) => a - b);
  const part = (value) => `${digits(100 * value, 2)} %`;
  const [half, all] = [off[Math.floor(off.length / 2)], off[off.length - 1]];
  return (
    `Of ${points.length} points half are off by at most ${part(half)}, all by at most ${part(all)}. ` +
    "The line is a perfect prediction."
  );
}

function drawing(points, what) {
  const all = points.flatMap((p) => [what.predicted(p), what.measured(p)]).map((v) => v / what.scale);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const ends = what.log ? [low / 1.3, high * 1.3] : [low - 0.06 * (high - low), high + 0.06 * (high - low)];
  const trace = ([, is, name, ink, symbol]) => {
    const mine = points.filter((p) => is(p, p.on_front));
    return {
      x: mine.map((p) => what.predicted(p) / what.scale),
      y: mine.map((p) => what.measured(p) / what.scale),
      name,
      mode: "markers",
      marker: { color: color(ink), symbol, size: 9 },
      text: mine.map(
        (p) =>
          `point ${p.id}: ${plain(p.origin)}<br>predicted ${what.show(what.predicted(p))}, measured ${what.show(what.measured(p))}`,
      ),
      hovertemplate: "%{text}<extra></extra>",
    };
  };
  const line = {
    x: ends,
    y: ends,
    mode: "lines",
    line: { color: color("muted"), dash: "dot", width: 1 },
    hoverinfo: "skip",
    showlegend: false,
  };
  return {
    data: [line, ...KINDS.map(trace).filter((one) => one.x.length)],
    layout: {
      height: 380,
      xaxis: axis(`predicted: ${what.title}`, what.log),
      yaxis: axis(`measured: ${what.title}`, what.log),
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
      showlegend: true,
      hovermode: "closest",
    },
  };
}
