// The chosen point's card, and the table of all points: what the figures show, for everybody.

import { download } from "./api.js";
import { failure, h, panel, put } from "./dom.js";
import { bits, bytes, counts, digits, fixed, kl } from "./format.js";
import { has, isPredicted, known, QUANTITIES } from "./quantities.js";

/** The card of the chosen point. */
export function cardPanel(state, { compare, exportIt }) {
  const body = h("div", { class: "card" });
  const section = panel("Chosen point", { id: "chosen" }, body);
  state.on(["front", "a"], () => {
    const point = state.point(state.a);
    put(
      body,
      point ? card(state, point, compare, exportIt) : h("p", { class: "muted" }, "No point is chosen yet."),
    );
  });
  return section;
}

function card(state, p, compare, exportIt) {
  const error = h("div", {});
  const name = `precision_map_${state.job.id}_${p.id}.json`;
  const take = () =>
    download(`/jobs/${state.job.id}/points/${p.id}/map`, name).catch((problem) =>
      put(error, failure(problem)),
    );
  return [
    h("p", {}, h("b", {}, `Point ${p.id}`), ` – ${p.origin}${p.control ? ` (${p.control} control)` : ""}`),
    h(
      "dl",
      {},
      facts(state, p).map(([term, text]) => h("div", {}, h("dt", {}, term), h("dd", {}, text))),
    ),
    h(
      "div",
      { class: "acts" },
      h("button", { onclick: take }, "Download map"),
      h("button", { onclick: exportIt }, "Export …"),
      h("button", { onclick: compare }, "Compare …"),
    ),
    error,
  ];
}

function facts(state, p) {
  const costs = known([p]).filter((name) => !["kl", "perplexity"].includes(name));
  const value = (name) =>
    QUANTITIES[name].show(QUANTITIES[name].of(p)) + (isPredicted(name, p) ? ", predicted" : "");
  const reference = state.front.reference_perplexity;
  return [
    ["KL", `${kl(p.kl)} (${kl(p.kl_low)} to ${kl(p.kl_high)})`],
    ["predicted KL", p.predicted_kl === null ? "–" : kl(p.predicted_kl)],
    ["perplexity", digits(p.perplexity) + (reference ? ` (unquantized ${digits(reference)})` : "")],
    ...costs.map((name) => [QUANTITIES[name].name, value(name)]),
    ["units", counts(p.schemes)],
    ["map", p.map_hash.slice(0, 12)],
  ];
}

/** A column: heading, what it sorts by, what it shows. */
function columnsOf(points) {
  const timed = ["memory_bytes", "decode_s", "prefill_s", "decode_j", "prefill_j"].filter((name) =>
    points.some((p) => has(name, p)),
  );
  return [
    ["point", (p) => p.id, (p) => `${p.id}`],
    ["bits", (p) => p.average_bits, (p) => bits(p.average_bits)],
    ["size", (p) => p.size_bytes, (p) => bytes(p.size_bytes)],
    ...(points.some((p) => p.cache_bytes !== undefined)
      ? [["of it KV cache", (p) => p.cache_bytes, (p) => bytes(p.cache_bytes)]]
      : []),
    ["KL", (p) => p.kl, (p) => kl(p.kl)],
    ["95 %", (p) => p.kl_high - p.kl_low, (p) => `${kl(p.kl_low)} to ${kl(p.kl_high)}`],
    ["predicted", (p) => p.predicted_kl, (p) => (p.predicted_kl === null ? "" : kl(p.predicted_kl))],
    ["search KL", (p) => p.search_kl, (p) => (p.search_kl === null ? "" : kl(p.search_kl))],
    ["perplexity", (p) => p.perplexity, (p) => fixed(p.perplexity, 2)],
    ...timed.map((name) => [
      QUANTITIES[name].name,
      QUANTITIES[name].of,
      (p) =>
        has(name, p)
          ? QUANTITIES[name].show(QUANTITIES[name].of(p)) + (isPredicted(name, p) ? " *" : "")
          : "",
    ]),
    ["units", (p) => counts(p.schemes), (p) => counts(p.schemes), "words"],
    ["what", (p) => p.origin, (p) => p.origin + (p.control ? ` (${p.control})` : ""), "words"],
  ];
}

/** The sortable table; its first columns choose A (whose map is shown) and B (compared with it). */
export function tablePanel(state) {
  const view = { by: "size", down: false };
  const body = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "All points" });
  const section = panel(
    "All points",
    {
      id: "points",
      note: "Choose A to see a point's map and B to compare. Points behind the front are grey; * is predicted.",
    },
    body,
  );
  const draw = () => put(body, table(state, view, draw));
  state.on(["front"], draw);
  state.on(["a", "b"], () => mark(body, state));
  return section;
}

function table(state, view, draw) {
  const columns = columnsOf(state.front.points);
  const key = columns.find(([name]) => name === view.by)[1];
  const sorted = [...state.front.points].sort((p, q) => (view.down ? -1 : 1) * order(key(p), key(q)));
  const head = ([name]) =>
    h(
      "th",
      { scope: "col", "aria-sort": view.by === name ? (view.down ? "descending" : "ascending") : null },
      h(
        "button",
        {
          class: "sort",
          "data-sort": name,
          onclick: () => {
            Object.assign(view, { by: name, down: view.by === name && !view.down });
            draw();
            document.querySelector(`[data-sort="${name}"]`)?.focus();
          },
        },
        name,
      ),
    );
  const radio = (which, p) =>
    h(
      "td",
      { class: "pick" },
      h("input", {
        type: "radio",
        name: `point-${which}`,
        value: p.id,
        checked: state[which] === p.id,
        "aria-label": `point ${p.id} as ${which.toUpperCase()}`,
        onchange: () => (which === "a" ? state.choose(p.id) : state.set({ b: p.id })),
      }),
    );
  const row = (p) =>
    h(
      "tr",
      { "data-point": p.id, class: p.on_front ? null : "off" },
      radio("a", p),
      radio("b", p),
      columns.map(([, , show, kind]) => h("td", { class: kind || null }, show(p))),
    );
  const rows = sorted.map(row);
  return h(
    "table",
    { class: "points" },
    h(
      "thead",
      {},
      h("tr", {}, h("th", { scope: "col" }, "A"), h("th", { scope: "col" }, "B"), columns.map(head)),
    ),
    h("tbody", {}, rows),
  );
}

function order(a, b) {
  if (a === null || a === undefined) return 1;
  if (b === null || b === undefined) return -1;
  return typeof a === "string" ? a.localeCompare(b) : a - b;
}

function mark(body, state) {
  for (const row of body.querySelectorAll("tr[data-point]")) {
    const id = Number(row.dataset.point);
    row.classList.toggle("chosen", id === state.a || id === state.b);
    row.querySelector("[name=point-a]").checked = id === state.a;
    row.querySelector("[name=point-b]").checked = id === state.b;
  }
}
