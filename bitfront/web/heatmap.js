// The bits of a map by layer and module.

import { h, labelled, panel, put, select } from "./dom.js";
import { bits, counts, fixed, kl } from "./format.js";
import { grid, legend, outside } from "./grid.js";
import { viridis } from "./theme.js";

/** The panel: the chosen point's map, or a solution's. */
export function heatPanel(state) {
  const choice = h("div", { class: "controls" });
  const body = h("div", {});
  const section = panel(
    "Bits by layer",
    { id: "heat", note: "Effective bits, scales included, of each unit of the map." },
    choice,
    body,
  );
  state.on(["front", "shown", "solutions", "detail"], () => {
    if (!state.detail) return put(body, h("p", { class: "muted" }, "The model's units aren't known yet."));
    const options = [
      ...[...state.front.points]
        .sort((p, q) => p.size_bytes - q.size_bytes)
        .map((p) => [
          String(p.id),
          `point ${p.id}: ${bits(p.average_bits)} bits, KL ${kl(p.kl)}${p.control ? `, ${p.control}` : ""}`,
        ]),
      ...state.solutions.map((s, i) => [`s${i}`, `solved: ${bits(s.average_bits)} bits, not measured`]),
    ];
    const chosen = select(options, state.shown, (value) =>
      value.startsWith("s") ? state.set({ shown: value }) : state.choose(Number(value)),
    );
    const focused = choice.contains(document.activeElement);
    put(
      choice,
      labelled("Map", chosen),
      state.map?.solution && h("span", { class: "badge predicted" }, "predicted, not measured"),
    );
    if (focused) chosen.focus();
    put(body, state.map ? drawn(state, state.map) : null);
  });
  return section;
}

/** The least and most bits that a unit of a layer has in any map: one scale for all, so that two
 *  maps can be compared by eye. */
function range({ detail, solutions }) {
  const inside = detail.units.map((unit, i) => i).filter((i) => detail.units[i].layer !== null);
  const maps = [...Object.values(detail.maps), ...solutions.map((s) => s.map)];
  const all = maps
    .flatMap((columns) => inside.map((i) => detail.bits[i][columns[i]]))
    .filter(Number.isFinite);
  return all.length ? [Math.min(...all), Math.max(...all)] : [0, 16];
}

function drawn(state, map) {
  const { detail } = state;
  const [low, high] = range(state);
  const of = (unit) => detail.bits[unit][map.columns[unit]];
  // few bits are bright, as in the report: what was cut shows
  const color = (share) => viridis(1 - share);
  const cell = (unit) => {
    const scheme = detail.menu[map.columns[unit]];
    const value = of(unit);
    // a map that somebody gave may have formats that this job's menu hasn't
    if (!Number.isFinite(value))
      return { text: "?", label: `${scheme || "a format"}, which isn't on the job's menu` };
    return {
      text: fixed(value, value >= 10 ? 0 : 1),
      label: `${fixed(value, 3)} bits, ${scheme}${detail.units[unit].open ? "" : " (pinned)"}`,
      color: color(high > low ? (value - low) / (high - low) : 0),
    };
  };
  const schemes = map.solution?.schemes || map.point?.schemes;
  return [
    grid(detail, "Bits of each unit", cell),
    h(
      "div",
      { class: "below" },
      legend(fixed(low, 1), fixed(high, 1), color, "bits"),
      h("span", { class: "muted" }, counts(schemes)),
    ),
    outside(detail, (unit) => detail.menu[map.columns[unit]] || "in a format outside the menu"),
  ];
}
