// What each unit loses under a scheme, as predicted: by layer and module, and the worst of all.

import { h, labelled, panel, put, select } from "./dom.js";
import { digits } from "./format.js";
import { grid, legend, outside } from "./grid.js";
import { viridis } from "./theme.js";

const WORST = 15;

/** The panel; the first scheme shown is the one that costs the most. */
export function sensitivityPanel(state) {
  const view = { scheme: null };
  const controls = h("div", { class: "controls" });
  const body = h("div", {});
  const section = panel(
    "Sensitivity",
    {
      id: "sensitivity",
      note: "Predicted loss of each unit under one scheme, all else unquantized; colours are logarithmic.",
    },
    controls,
    body,
  );
  const draw = () => put(body, drawn(state.detail, view.scheme));
  state.on(["detail"], () => {
    const { sensitivity, menu } = state.detail || {};
    if (!sensitivity) return put(body, h("p", { class: "muted" }, "Not estimated yet."));
    const total = (scheme) => sensitivity.values.reduce((sum, row) => sum + (row[scheme] || 0), 0);
    const there = menu
      .map((name, i) => [i, name])
      .filter(([i]) => total(i) > 0)
      .sort(([i], [j]) => total(j) - total(i));
    if (!there.length) return put(body, h("p", { class: "muted" }, "No scheme loses anything."));
    view.scheme ??= there[0][0];
    put(
      controls,
      labelled(
        "Scheme",
        select(there, view.scheme, (value) => ((view.scheme = Number(value)), draw())),
      ),
      h("span", { class: "muted" }, `${sensitivity.estimator}, ${sensitivity.unit || "nats per token"}`),
    );
    draw();
  });
  return section;
}

function drawn(detail, scheme) {
  const value = (unit) => detail.sensitivity.values[unit][scheme];
  const units = detail.units.map((_, i) => i).filter((i) => value(i) > 0);
  const inside = units.filter((i) => detail.units[i].layer !== null);
  const logs = inside.map((i) => Math.log10(value(i)));
  const [low, high] = [Math.min(...logs), Math.max(...logs)];
  const share = (unit) => (high > low ? (Math.log10(value(unit)) - low) / (high - low) : 0.5);
  const cell = (unit) => {
    const loss = value(unit);
    if (loss === null || loss === undefined) return { text: "", label: "not on the menu of this unit" };
    return {
      text: "",
      label: `${digits(loss, 3)} nats per token`,
      color: loss > 0 ? viridis(share(unit)) : null,
    };
  };
  return [
    grid(detail, `Predicted loss of each unit under ${detail.menu[scheme]}`, cell),
    h(
      "div",
      { class: "below" },
      inside.length ? legend(digits(10 ** low, 2), digits(10 ** high, 2), viridis, "nats per token") : null,
    ),
    outside(detail, (unit) =>
      value(unit) === null ? "has no other scheme" : `loses ${digits(value(unit), 3)}`,
    ),
    worst(detail, units, value),
  ];
}

/** The units that lose most, as bars. */
function worst(detail, units, value) {
  const sorted = units.sort((i, j) => value(j) - value(i)).slice(0, WORST);
  if (!sorted.length) return null;
  const most = value(sorted[0]);
  const all = units.reduce((sum, unit) => sum + value(unit), 0);
  return h(
    "details",
    {},
    h("summary", {}, `The ${sorted.length} that lose most`),
    bars(
      sorted.map((unit) => [
        detail.units[unit].name,
        value(unit) / most,
        `${digits(value(unit), 3)} (${digits((100 * value(unit)) / all, 2)} %)`,
      ]),
    ),
  );
}

/** Horizontal bars: [name, share of the longest, text]. */
export const bars = (rows) =>
  h(
    "table",
    { class: "bars" },
    h(
      "tbody",
      {},
      rows.map(([name, share, text]) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, name),
          h("td", {}, h("div", { class: "bar", style: { width: `${Math.max(100 * share, 0.5)}%` } })),
          h("td", { class: "value" }, text),
        ),
      ),
    ),
  );
