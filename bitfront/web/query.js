// One question to all jobs: the best measured point within limits.

import { get, query } from "./api.js";
import { failure, field, h, newId, put } from "./dom.js";
import { bits, bytes, counts, digits, kl } from "./format.js";
import { known, QUANTITIES } from "./quantities.js";

const LIMITS = Object.keys(QUANTITIES).filter((name) => QUANTITIES[name].limit);

/** #/query, whose parameters fill in the form: #/query?model=SmolLM2&weight_bytes=120MB */
export async function page(main, { search }, signal) {
  const { jobs } = await get(`/jobs${query({ limit: 200 })}`, signal);
  const names = newId("models");
  const text = (value, more = {}) =>
    h("input", { type: "text", autocomplete: "off", spellcheck: "false", value: value || "", ...more });
  const model = field("Model", text(search.get("model"), { list: names }), {
    hint: "All or part of its name; empty for every model.",
  });
  const job = field("Job", text(search.get("job"), { inputmode: "numeric" }), {
    hint: "Its number, if only one counts.",
  });
  const limits = LIMITS.map((name) => [
    name,
    field(QUANTITIES[name].limit, text(search.get(name), { placeholder: QUANTITIES[name].example })),
  ]);
  const workload = ["batch", "context"].map((name) => [
    name,
    field(
      name === "batch" ? "Sequences" : "Tokens of context",
      text(search.get(name), { inputmode: "numeric" }),
    ),
  ]);
  const fields = new Map([["model", model], ["job", job], ...limits, ...workload]);
  const found = h("div", { "aria-live": "polite" });
  const form = h(
    "form",
    { class: "panel wide", onsubmit: (event) => (event.preventDefault(), ask(fields, found, signal)) },
    h(
      "div",
      { class: "fields" },
      model,
      job,
      limits.map(([, box]) => box),
    ),
    h(
      "details",
      {},
      h("summary", {}, "Workload that memory is counted for"),
      h(
        "div",
        { class: "fields" },
        workload.map(([, box]) => box),
      ),
    ),
    h("button", { class: "primary" }, "Find the best point"),
    h(
      "datalist",
      { id: names },
      [...new Set(jobs.map((one) => one.model))].map((value) => h("option", { value })),
    ),
  );
  put(
    main,
    h("h1", {}, "Which map, under these limits?"),
    h(
      "p",
      { class: "muted" },
      "The measured point of the least KL within all limits; with a limit on the KL, the one of the fewest bytes.",
    ),
    form,
    found,
  );
  if (search.size) ask(fields, found, signal);
}

/** Read the fields; null where one can't be read (and says so). */
function values(fields) {
  const found = {};
  let wrong = false;
  for (const [name, box] of fields) {
    const text = box.querySelector("input").value.trim();
    const value = text === "" ? null : QUANTITIES[name]?.parse ? QUANTITIES[name].parse(text) : text;
    const bad =
      text !== "" && (value === null || (["job", "batch", "context"].includes(name) && !/^\d+$/.test(text)));
    box.fail(bad ? `Write it like ${QUANTITIES[name]?.example || "1"}.` : null);
    wrong ||= bad;
    found[name] = value;
  }
  return wrong ? null : found;
}

async function ask(fields, element, signal) {
  const asked = values(fields);
  if (!asked) return fields.forEach((box) => box.querySelector("[aria-invalid]")?.focus());
  try {
    put(element, answer(await get(`/query${query(asked)}`, signal)));
  } catch (error) {
    if (!signal.aborted) put(element, failure(error));
  }
}

const other = ({ job, model, point }) =>
  h(
    "li",
    {},
    h("a", { href: `#/jobs/${job}?point=${point.id}` }, `Job ${job}, point ${point.id}`),
    ` (${model}): ${bits(point.average_bits)} bits, ${bytes(point.weight_bytes)}, KL ${kl(point.kl)}`,
  );

function answer(found) {
  const { point } = found;
  const costs = known([point]).filter(
    (name) => !["kl", "perplexity", "weight_bytes", "average_bits", "memory_bytes"].includes(name),
  );
  const facts = [
    ["average bits", bits(point.average_bits)],
    ["weights", bytes(point.weight_bytes)],
    [
      "memory",
      `${bytes(found.memory_bytes)} at ${found.workload.batch} × ${found.workload.context} tokens (KV cache ${bytes(found.kv_cache_bytes)})`,
    ],
    ["KL, nats per token", `${kl(point.kl)} (${kl(point.kl_low)} to ${kl(point.kl_high)})`],
    ["perplexity", digits(point.perplexity)],
    ...costs.map((name) => [QUANTITIES[name].name, QUANTITIES[name].show(QUANTITIES[name].of(point))]),
    ["units", counts(point.schemes)],
    ["considered", `${found.considered} measured points`],
  ];
  return h(
    "section",
    { class: "panel wide card", "aria-label": "Answer" },
    h(
      "h2",
      {},
      h("a", { href: `#/jobs/${found.job}?point=${point.id}` }, `Job ${found.job}, point ${point.id}`),
    ),
    h("p", {}, `${found.model} – ${point.origin}${point.control ? ` (${point.control} control)` : ""}`),
    h(
      "dl",
      {},
      facts.map(([term, text]) => h("div", {}, h("dt", {}, term), h("dd", {}, text))),
    ),
    found.others?.length
      ? [h("h3", {}, "Measured on other texts, so not comparable"), h("ul", {}, found.others.map(other))]
      : null,
  );
}
