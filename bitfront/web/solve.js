// Another budget, solved from the table that is there: no model is loaded, nothing is measured.

import { post } from "./api.js";
import { failure, field, h, panel, put, say, select } from "./dom.js";
import { bits, bytes, counts, digits, kl, parseBytes, parseNumber } from "./format.js";
import { draftOf } from "./draft.js";

/** The panel "what would 4.1 bits look like?". */
export function solvePanel(state) {
  const input = h("input", {
    type: "text",
    value: "",
    required: true,
    placeholder: "4.1",
    autocomplete: "off",
  });
  const kind = select(
    [
      ["average_bits", "average bits"],
      ["weight_bytes", "size, such as 95MB"],
    ],
    "average_bits",
    (value) => (input.placeholder = value === "average_bits" ? "4.1" : "95MB"),
  );
  const budget = field("Budget", input, { hint: "One, or several with commas." });
  const found = h("div", {});
  const button = h("button", { class: "primary" }, "Solve");
  const form = h(
    "form",
    {
      class: "inline",
      onsubmit: (event) => (event.preventDefault(), run(state, kind.value, input, budget, button, found)),
    },
    budget,
    field("In", kind),
    button,
  );
  const section = panel(
    "What would another budget look like?",
    {
      wide: false,
      id: "solve",
      note: "Solved exactly on the predicted losses, in a second or less; drawn on the front and the map as predictions.",
    },
    form,
    found,
  );
  state.on(["solutions", "shown"], () => put(found, state.solutions.length ? list(state) : null));
  return section;
}

async function run(state, kind, input, budget, button, found) {
  const parse = kind === "average_bits" ? parseNumber : parseBytes;
  const values = input.value.split(",").map((part) => parse(part));
  budget.fail(
    values.some((value) => !value)
      ? kind === "average_bits"
        ? "Write bits like 4.1, or 3.5, 4.1."
        : "Write sizes like 95MB."
      : null,
  );
  if (values.some((value) => !value)) return;
  button.disabled = true;
  try {
    const answer = await post(`/jobs/${state.job.id}/solve`, { [kind]: values });
    const at = state.solutions.length;
    state.set({ solutions: [...state.solutions, ...answer.solutions], shown: `s${at}` });
    say(`Solved: predicted KL ${answer.solutions.map((s) => kl(s.predicted_kl)).join(", ")}.`);
  } catch (error) {
    put(found, failure(error), state.solutions.length ? list(state) : null);
  }
  button.disabled = false;
}

/** The measured point of the most similar size, if the API names none. */
const nearest = (state, s) =>
  s.measured_as ??
  s.nearest ??
  [...state.front.points].sort(
    (p, q) => Math.abs(p.weight_bytes - s.weight_bytes) - Math.abs(q.weight_bytes - s.weight_bytes),
  )[0].id;

function list(state) {
  return h(
    "ul",
    { class: "solutions" },
    state.solutions.map((s, i) => {
      const shown = state.shown === `s${i}`;
      return h(
        "li",
        { class: shown ? "chosen" : null },
        h(
          "p",
          {},
          h("span", { class: "badge predicted" }, "predicted"),
          ` ${bits(s.average_bits)} bits, ${bytes(s.weight_bytes)}, KL ${kl(s.predicted_kl)}`,
          s.gap === null || s.gap === undefined
            ? null
            : `; at most ${digits(100 * s.gap, 2)} % from the optimum`,
        ),
        h(
          "p",
          { class: "muted" },
          counts(s.schemes),
          s.measured_as
            ? `; measured as point ${s.measured_as}`
            : `; the nearest measured one is point ${nearest(state, s)}`,
        ),
        h(
          "div",
          { class: "acts" },
          h(
            "button",
            { "aria-pressed": String(shown), onclick: () => state.set({ shown: `s${i}` }) },
            "Show its map",
          ),
          h("button", { onclick: () => state.choose(nearest(state, s)) }, `Point ${nearest(state, s)}`),
          h("button", { onclick: () => submitWith(state, s) }, "Measure it: new job …"),
        ),
      );
    }),
  );
}

/** A job like this one, with this budget; the form shows it before anything is sent. */
function submitWith(state, solution) {
  draftOf({
    ...configOf(state.job.config),
    budgets: [],
    budgets_bytes: [solution.budget_bytes ?? solution.weight_bytes],
  });
  location.hash = "#/submit";
}

/** What is null or empty says nothing, and a form is shorter without it. */
function configOf(config) {
  const told = (value) =>
    !(
      value === null ||
      (Array.isArray(value) && !value.length) ||
      (typeof value === "object" && !Object.keys(value).length)
    );
  const clean = (value) =>
    value && typeof value === "object" && !Array.isArray(value)
      ? Object.fromEntries(
          Object.entries(value)
            .map(([k, v]) => [k, clean(v)])
            .filter(([, v]) => told(v)),
        )
      : value;
  return clean(config || {});
}
