// Two points side by side: their paired difference, a verdict, and the units that differ.

import { get, query } from "./api.js";
import { failure, field, h, put, select } from "./dom.js";
import { bits, bytes, fixed, kl, sentence, signed } from "./format.js";
import { grid, legend } from "./grid.js";
import { known, QUANTITIES } from "./quantities.js";
import { diverging } from "./theme.js";

/** #/compare?a=JOB:POINT&b=JOB:POINT */
export async function page(main, { search }, signal) {
  const { jobs } = await get(`/jobs${query({ limit: 200 })}`, signal);
  const measured = jobs.filter((job) => job.points > 0);
  const shown = h("div", { class: "panel wide" });
  const view = { a: parsed(search.get("a")), b: parsed(search.get("b")) };
  const update = () => {
    if (!view.a || !view.b) return put(shown, h("p", { class: "muted" }, "Choose two points."));
    const address = `#/compare?a=${view.a.join(":")}&b=${view.b.join(":")}`;
    if (location.hash !== address) history.replaceState(null, "", address); // no event: this page stays
    comparison(shown, view.a.join(":"), view.b.join(":"), signal);
  };
  put(
    main,
    h("h1", {}, "Compare two points"),
    h(
      "div",
      { class: "pickers" },
      picker("A", measured, view, "a", update, signal),
      picker("B", measured, view, "b", update, signal),
    ),
    shown,
  );
  update();
}

const parsed = (text) => (/^\d+:\d+$/.test(text || "") ? text.split(":").map(Number) : null);

function picker(name, jobs, view, which, update, signal) {
  const points = h("div", {});
  const fill = async (job) => {
    const front = await get(`/jobs/${job}/front`, signal);
    const options = front.points.map((p) => [
      p.id,
      `point ${p.id}: ${bits(p.average_bits)} bits, KL ${kl(p.kl)}${p.control ? `, ${p.control}` : ""}`,
    ]);
    const chosen = view[which]?.[0] === job ? view[which][1] : options[0]?.[0];
    put(
      points,
      field(
        "Point",
        select(options, chosen, (id) => ((view[which] = [job, Number(id)]), update())),
      ),
    );
    return chosen;
  };
  const change = async (job) => {
    const chosen = await fill(job);
    view[which] = chosen === undefined ? null : [job, chosen];
    update();
  };
  const start = view[which]?.[0] ?? jobs[0]?.id;
  const chooser = field(
    "Job",
    select(
      jobs.map((job) => [job.id, `${job.id}: ${job.model}`]),
      start,
      (id) => change(Number(id)).catch((error) => put(points, failure(error))),
    ),
  );
  if (start !== undefined)
    (view[which] ? fill(start) : change(start)).catch((error) => put(points, failure(error)));
  return h("fieldset", { class: "panel" }, h("legend", {}, name), chooser, points);
}

/** Draw the comparison of two points (`JOB:POINT`) into an element. */
export async function comparison(element, a, b, signal, detail = null) {
  const asked = `${a} ${b}`;
  element.dataset.asked = asked;
  try {
    const found = await get(`/compare${query({ a, b })}`, signal);
    const detailOf = (job) => get(`/jobs/${job}/detail`, signal).catch(() => null);
    const first = detail || (await detailOf(found.a.job));
    const second = found.a.job === found.b.job ? first : await detailOf(found.b.job);
    if (element.dataset.asked === asked) put(element, result(found, [first, second]));
  } catch (error) {
    if (!signal.aborted && element.dataset.asked === asked) put(element, failure(error));
  }
}

function result(found, details) {
  const { difference, differing, same } = found;
  return [
    h("p", { class: "verdict" }, sentence(found.verdict)),
    h(
      "p",
      {},
      "KL of A minus KL of B: ",
      h("b", { class: "difference" }, `${signed(difference.mean)}`),
      ` nats per token, 95 % interval `,
      h("b", { class: "interval" }, `${signed(difference.low)} to ${signed(difference.high)}`),
      `, paired over ${found.chunks} chunks.`,
    ),
    whisker(difference),
    sides(found),
    h("h3", {}, `${differing.length} units differ, ${same} are the same`),
    differing.length ? [differenceMap(found, details), listing(differing)] : null,
  ];
}

/** The interval on a line with zero in it: on the left of zero A loses less. */
function whisker({ mean, low, high }) {
  const reach = 1.15 * Math.max(Math.abs(low), Math.abs(high), 1e-12);
  const at = (value) => `${50 + (50 * value) / reach}%`;
  const width = `${(50 * (high - low)) / reach}%`;
  return h(
    "div",
    { class: "whisker", "aria-hidden": "true" },
    h(
      "div",
      { class: "line" },
      h("i", { class: "zero", style: { left: "50%" } }),
      h("i", { class: "span", style: { left: at(low), width } }),
      h("i", { class: "mean", style: { left: at(mean) } }),
    ),
    h(
      "div",
      { class: "ends muted" },
      h("span", {}, "← A loses less"),
      h("span", {}, "0"),
      h("span", {}, "B loses less →"),
    ),
  );
}

function sides({ a, b }) {
  const costs = known([a, b]);
  const both = (name) => [QUANTITIES[name].of(a), QUANTITIES[name].of(b)];
  const change = ([x, y]) => (x && y ? `${signed(100 * (x / y - 1), 2)} %` : "");
  const row = (name) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, QUANTITIES[name].name),
      both(name).map((value) =>
        h("td", {}, value === null || value === undefined ? "" : QUANTITIES[name].show(value)),
      ),
      h("td", {}, change(both(name))),
    );
  const head = (p, name) => h("th", { scope: "col" }, `${name}: job ${p.job}, point ${p.id}`);
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "A and B" },
    h(
      "table",
      { class: "points sides" },
      h(
        "thead",
        {},
        h("tr", {}, h("td", {}), head(a, "A"), head(b, "B"), h("th", { scope: "col" }, "A against B")),
      ),
      h(
        "tbody",
        {},
        costs.map(row),
        h(
          "tr",
          {},
          h("th", { scope: "row" }, "KL, 95 %"),
          [a, b].map((p) => h("td", {}, `${kl(p.kl_low)} to ${kl(p.kl_high)}`)),
          h("td", {}),
        ),
        h(
          "tr",
          {},
          h("th", { scope: "row" }, "what"),
          [a, b].map((p) => h("td", {}, p.origin)),
          h("td", {}),
        ),
      ),
    ),
  );
}

/** Bits of A minus bits of B, by layer and module; each by the table of its own job. */
function differenceMap({ differing }, [detail, other]) {
  if (!detail || !other) return null;
  const of = new Map(differing.map((entry) => [entry.unit, entry]));
  const places = new Map(other.units.map((unit, i) => [unit.name, i]));
  const bitsOf = (table, unit, scheme) => table.bits[unit]?.[table.menu.indexOf(scheme)] ?? NaN;
  const gaps = detail.units.map(({ name }, i) => {
    const entry = of.get(name);
    return entry ? bitsOf(detail, i, entry.a) - bitsOf(other, places.get(name), entry.b) : 0;
  });
  const most = Math.max(...gaps.filter(Number.isFinite).map(Math.abs), 1e-9);
  const cell = (i) => {
    const entry = of.get(detail.units[i].name);
    if (!entry) return { text: "", label: "the same" };
    const label = `A ${entry.a}, B ${entry.b}`;
    if (!Number.isFinite(gaps[i])) return { text: "?", label }; // a format that isn't on the menu
    return {
      text: signed(gaps[i], 2),
      label: `${label}: ${signed(gaps[i], 3)} bits`,
      color: diverging(0.5 + gaps[i] / most / 2),
    };
  };
  return [
    grid(detail, "Bits of A minus bits of B", cell),
    h(
      "div",
      { class: "below" },
      legend(`${fixed(-most, 1)}: B has more`, `+${fixed(most, 1)}: A has more`, diverging, "bits"),
    ),
  ];
}

const listing = (differing) =>
  h(
    "details",
    {},
    h("summary", {}, "The units that differ"),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Units that differ" },
      h(
        "table",
        { class: "points" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            ["unit", "A", "B"].map((text) => h("th", { scope: "col" }, text)),
          ),
        ),
        h(
          "tbody",
          {},
          differing.map((d) =>
            h("tr", {}, h("th", { scope: "row" }, d.unit), h("td", {}, d.a), h("td", {}, d.b)),
          ),
        ),
      ),
    ),
  );
