// The front: every measured point once, by kind; predictions, the chosen ones, and marks of limits.

import { field, h, panel, put, select, tick } from "./dom.js";
import { bits, bytes, counts, digits, kl } from "./format.js";
import { placeHandles } from "./handles.js";
import { axis, figure, plain } from "./plot.js";
import { best, frontOf, has, isPredicted, known, QUANTITIES } from "./quantities.js";
import { color } from "./theme.js";

/** Kinds of point: whether a point is one, its legend, colour and symbol (report.py has the same). */
export const KINDS = [
  ["front", (p, on) => !p.control && on, "searched, on the front", "accent", "circle"],
  ["behind", (p, on) => !p.control && !on, "searched, behind it", "accent", "circle-open"],
  ["uniform", (p) => p.control === "uniform", "uniform (control)", "control", "square"],
  ["random", (p) => p.control === "random", "random (control)", "faint", "x"],
  ["preset", (p) => p.control === "preset", "preset (control)", "green", "diamond"],
  ["given", (p) => p.control === "given", "given (control)", "violet", "star"],
];

/** The panel with its axes' choices. */
export function frontPanel(state) {
  const view = { x: "weight_bytes", y: "kl", logx: false, logy: true, predicted: true };
  const box = figure("Measured points; the table of all points below has the same figures.", state.signal);
  const bar = h("div", { class: "controls" });
  const draw = () => box.draw(() => drawing(state, view, box));
  const section = panel(
    "Loss against cost, measured on held-out text",
    {
      wide: false,
      id: "front",
      note: "Choose a point to see its map; with Shift, to compare it. Drag the marks at the edges to set limits.",
    },
    bar,
    box,
  );
  let names = "";
  state.on(["front"], () => {
    const found = known(state.front.points);
    if (names === found.join()) return;
    names = found.join();
    put(bar, axes(view, found, draw));
  });
  state.on(["front", "limits", "a", "b", "solutions", "shown"], draw);
  box.addEventListener("drawn", () => {
    follow(box, state);
    placeHandles(box, state, view);
  });
  return section;
}

/** High enough to read, low enough to be seen with what is above it. */
function heightOf() {
  return Math.min(Math.max(innerHeight - 330, 440), 620);
}

function axes(view, found, draw) {
  const names = found.map((name) => [name, QUANTITIES[name].name]);
  const part = (which, label) =>
    h(
      "div",
      { class: "axis" },
      field(
        label,
        select(names, view[which], (value) => {
          view[which] = value;
          const log = bar.querySelector(`[data-log=${which}]`);
          log.checked = view[`log${which}`] = Boolean(QUANTITIES[value].log);
          draw();
        }),
      ),
      logTick(view, which, draw),
    );
  const bar = h(
    "div",
    { class: "axes" },
    part("x", "Across"),
    part("y", "Up"),
    tick("predictions", view.predicted, (on) => ((view.predicted = on), draw())),
  );
  return bar;
}

function logTick(view, which, draw) {
  const box = tick("log", view[`log${which}`], (on) => ((view[`log${which}`] = on), draw()));
  box.input.dataset.log = which;
  box.input.setAttribute("aria-label", `logarithmic ${which === "x" ? "horizontal" : "vertical"} axis`);
  return box;
}

/** What is drawn: data and layout. */
function drawing(state, view, box) {
  const { points } = state.front;
  const [qx, qy] = [QUANTITIES[view.x], QUANTITIES[view.y]];
  const drawn = points.filter((p) => has(view.x, p) && has(view.y, p));
  const usual = view.x === "weight_bytes" && view.y === "kl";
  // in the plane that the search looks at, the API says what is on the front
  const on = usual
    ? drawn.filter((p) => p.on_front).sort((p, q) => qx.of(p) - qx.of(q))
    : frontOf(drawn, view.x, view.y);
  const [sx, ux] = qx.scale(drawn.map(qx.of).concat(1e-9));
  const [sy, uy] = qy.scale(drawn.map(qy.of).concat(1e-9));
  const at = (list) => ({ x: list.map((p) => qx.of(p) / sx), y: list.map((p) => qy.of(p) / sy) });
  Object.assign(view, { sx, sy });
  const ids = new Set(on.map((p) => p.id));
  const data = [
    {
      ...at(on),
      mode: "lines",
      line: { color: color("accent"), width: 1.5 },
      hoverinfo: "skip",
      showlegend: false,
    },
    ...KINDS.map((kind) =>
      trace(
        kind,
        drawn.filter((p) => kind[1](p, ids.has(p.id))),
        at,
        view,
      ),
    ),
    ...predictions(state, view, on, at),
    marks(state, drawn, at),
  ].filter((one) => one && one.x.length);
  const narrow = box.clientWidth < 520;
  const cached = points.some((p) => p.cache_bytes !== undefined);
  const whole = (q) => (q === QUANTITIES.weight_bytes && cached ? "weights and KV cache" : q.title);
  const named = (q, unit) => (narrow ? q.name : whole(q)) + (unit ? `, ${unit}` : "");
  const layout = {
    height: heightOf(),
    xaxis: axis(named(qx, ux), view.logx),
    yaxis: axis(named(qy, uy), view.logy),
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 12 } },
    showlegend: true,
    hovermode: "closest",
    ...floor(state, view, sy),
  };
  return { data, layout };
}

function trace([kind, , name, ink, symbol], points, at, view) {
  const errors = view.y === "kl" && {
    error_y: {
      type: "data",
      symmetric: false,
      thickness: 1.2,
      width: 4,
      color: color(ink),
      array: points.map((p) => p.kl_high - p.kl),
      // an interval that reaches below zero would leave a logarithmic axis
      arrayminus: points.map((p) => Math.min(p.kl - p.kl_low, 0.999 * p.kl)),
    },
  };
  return {
    ...at(points),
    ...errors,
    name,
    meta: "measured",
    mode: "markers",
    customdata: points.map((p) => p.id),
    marker: {
      symbol,
      size: kind === "behind" ? 8 : 9,
      color: color(ink),
      opacity: 1,
      line: symbol === "circle-open" ? { width: 1.5 } : undefined,
    },
    text: points.map(hover),
    hovertemplate: "%{text}<extra></extra>",
  };
}

/** What is told of a point under the pointer: map, bits, KL with its interval, costs. */
function hover(p) {
  const cost = known([p]).filter(
    (name) => !["weight_bytes", "average_bits", "kl", "perplexity"].includes(name),
  );
  return [
    `<b>point ${p.id}</b>: ${plain(p.origin)}`,
    `${bytes(QUANTITIES.weight_bytes.of(p))}, ${bits(p.average_bits)} bits`,
    `KL ${kl(p.kl)} (${kl(p.kl_low)} to ${kl(p.kl_high)}), perplexity ${digits(p.perplexity)}`,
    cost
      .map(
        (name) =>
          `${QUANTITIES[name].name} ${QUANTITIES[name].show(QUANTITIES[name].of(p))}${isPredicted(name, p) ? " (predicted)" : ""}`,
      )
      .join(", "),
    wrapped(plain(counts(p.schemes))),
  ]
    .filter(Boolean)
    .join("<br>");
}

const wrapped = (text) => text.replace(/(.{50}[^,]*,) /g, "$1<br>");

/** The predicted KL of the points on the front, and what was solved for since. */
function predictions(state, view, on, at) {
  if (view.y !== "kl" || !view.predicted) return [];
  const guess = (p) => ({ ...p, kl: p.predicted_kl });
  const foretold = on.filter((p) => p.predicted_kl).map(guess);
  const solved = state.solutions
    .map((s, i) => ({ ...s, kl: s.predicted_kl, i }))
    .filter((s) => s.kl && has(view.x, s));
  return [
    {
      ...at(foretold),
      name: "the same maps, predicted",
      mode: "markers",
      marker: { symbol: "line-ew-open", size: 15, color: color("accent"), line: { width: 2 } },
      hovertemplate: "predicted KL %{y:.4g}<extra></extra>",
    },
    {
      ...at(solved),
      name: "solved for, predicted",
      mode: "markers",
      meta: "solved",
      customdata: solved.map((s) => `s${s.i}`),
      marker: { symbol: "triangle-up-open", size: 11, color: color("violet"), line: { width: 2 } },
      text: solved.map(
        (s) =>
          `${bytes(s.weight_bytes)}, ${bits(s.average_bits)} bits<br>predicted KL ${kl(s.kl)}, not measured<br>${wrapped(plain(counts(s.schemes)))}`,
      ),
      hovertemplate: "%{text}<extra></extra>",
    },
  ];
}

/** Rings around the best point and those chosen. */
function marks(state, drawn, at) {
  const found = best(state.front.points, state.limits).point;
  const named = new Map();
  const name = (id, text) =>
    id !== null && id !== undefined && named.set(id, [...(named.get(id) || []), text]);
  if (Object.keys(state.limits).length) name(found?.id, "best");
  name(state.a, "A");
  name(state.b, "B");
  const ringed = drawn.filter((p) => named.has(p.id));
  return {
    ...at(ringed),
    mode: "markers+text",
    meta: "rings",
    showlegend: false,
    hoverinfo: "skip",
    cliponaxis: false,
    customdata: ringed.map((p) => p.id),
    text: ringed.map((p) => `<b>${named.get(p.id).join(" · ")}</b>`),
    textposition: "top right",
    textfont: { color: color("ink") },
    marker: { symbol: "circle-open", size: 19, color: color("ink"), line: { width: 1.8 } },
  };
}

/** The noise of arithmetic, below which no KL means anything. */
function floor(state, view, sy) {
  const noise = state.front.noise_floor;
  if (view.y !== "kl" || !noise) return {};
  return {
    shapes: [
      {
        type: "line",
        xref: "paper",
        x0: 0,
        x1: 1,
        y0: noise / sy,
        y1: noise / sy,
        line: { dash: "dot", color: color("muted"), width: 1 },
      },
    ],
    annotations: [
      {
        x: 0,
        xref: "paper",
        xanchor: "left",
        y: view.logy ? Math.log10(noise / sy) : noise / sy,
        yanchor: "bottom",
        showarrow: false,
        text: "noise of arithmetic",
        font: { color: color("muted"), size: 12 },
      },
    ],
  };
}

/** Clicks choose; plotly forgets listeners of a figure that it drew anew, so this is asked each time. */
function follow(box, state) {
  if (box.dataset.followed) return;
  box.dataset.followed = "yes";
  box.on("plotly_click", ({ points, event }) => {
    const id = points[0]?.customdata;
    if (id === undefined) return;
    if (typeof id === "string") state.set({ shown: id });
    else if (event.shiftKey) state.set({ b: id });
    else state.choose(id);
  });
}
