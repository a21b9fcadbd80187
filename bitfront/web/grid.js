// A map of layers × modules: one cell a unit, in colour and words, for pointer and keyboard.

import { h, newId } from "./dom.js";

/** A heat map. `cell(unit index)` gives {text, label, color: {background, ink}} or null for nothing.
 *
 *  It is a table in which arrow keys go from cell to cell (one stop for Tab), and a line below that
 *  says what a cell is: on a phone there is no pointer that hovers. */
export function grid(detail, caption, cell) {
  const place = new Map(detail.units.map((unit, i) => [`${unit.row}/${unit.layer}`, i]));
  const readout = h(
    "p",
    { class: "readout muted", id: newId("readout") },
    "Point at a cell, or move with the arrow keys.",
  );
  const body = detail.rows.map((row) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, row),
      Array.from({ length: detail.layers }, (_, layer) => one(row, layer, place, cell)),
    ),
  );
  const numbers = Array.from({ length: detail.layers }, (_, layer) =>
    h("th", { scope: "col" }, layer % 5 ? h("span", { class: "minor" }, `${layer}`) : `${layer}`),
  );
  const table = h(
    "table",
    { class: "grid", role: "grid", "aria-label": caption },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "layer"), numbers)),
    h("tbody", {}, body),
  );
  const first = table.querySelector("td[data-unit]") || table.querySelector("td");
  if (first) first.tabIndex = 0;
  walk(table, readout);
  return h("div", { class: "heat" }, h("div", { class: "scroll" }, table), readout);
}

function one(row, layer, place, cell) {
  const unit = place.get(`${row}/${layer}`);
  const found = unit === undefined ? null : cell(unit);
  const label = `layer ${layer}, ${row}: ${found ? found.label : "no such unit"}`;
  const style = found?.color ? { background: found.color.background, color: found.color.ink } : {};
  return h(
    "td",
    { role: "gridcell", tabindex: "-1", "aria-label": label, "data-unit": unit, style },
    h("span", {}, found?.text || ""),
  );
}

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

function walk(table, readout) {
  const tell = (event) => {
    const cell = event.target.closest("td");
    if (cell) readout.textContent = cell.getAttribute("aria-label");
  };
  table.addEventListener("pointerover", tell);
  table.addEventListener("focusin", tell);
  table.addEventListener("keydown", (event) => {
    const cell = event.target.closest("td");
    if (!cell || !(event.key in STEPS || event.key === "Home" || event.key === "End")) return;
    event.preventDefault();
    const rows = [...table.tBodies[0].rows];
    const row = rows.indexOf(cell.parentElement);
    const [down, right] = STEPS[event.key] || [0, event.key === "Home" ? -cell.cellIndex : 1e6];
    const cells = rows[Math.min(Math.max(row + down, 0), rows.length - 1)].cells;
    const next = cells[Math.min(Math.max(cell.cellIndex + right, 1), cells.length - 1)];
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

/** A scale of colours with its ends. */
export function legend(low, high, color, title) {
  const steps = Array.from({ length: 24 }, (_, i) =>
    h("i", { style: { background: color(i / 23).background } }),
  );
  return h(
    "div",
    { class: "legend", role: "img", "aria-label": `${title}: ${low} to ${high}` },
    h("span", {}, title),
    h("span", {}, low),
    h("span", { class: "steps" }, steps),
    h("span", {}, high),
  );
}

/** Units outside the layers (embedding, head), which the grid has no place for. */
export function outside(detail, text) {
  const units = detail.units.map((unit, i) => [unit, i]).filter(([unit]) => unit.layer === null);
  if (!units.length) return null;
  return h(
    "p",
    { class: "muted outside" },
    "Outside the layers: ",
    units
      .map(([unit, i]) => `${unit.name} (${unit.kind}) ${text(i)}${unit.open ? "" : ", pinned"}`)
      .join("; "),
    ".",
  );
}
