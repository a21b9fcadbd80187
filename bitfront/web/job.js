// One job: what it is, how far it is, and all that it measured.

import { get } from "./api.js";
import { comparison } from "./compare.js";
import { failure, h, labelled, panel, prose, put, say, select } from "./dom.js";
import { exportPanel } from "./exports.js";
import { age, bits, digits, kl } from "./format.js";
import { frontPanel } from "./front.js";
import { heatPanel } from "./heatmap.js";
import { actions } from "./jobs.js";
import { limitsPanel } from "./limits.js";
import { ENDED, live } from "./live.js";
import { logPanel } from "./log.js";
import { cardPanel, tablePanel } from "./points.js";
import { predictionPanel } from "./prediction.js";
import { badge, progressBar } from "./progress.js";
import { sensitivityPanel } from "./sensitivity.js";
import { solvePanel } from "./solve.js";
import { State } from "./state.js";
import { timingPanel } from "./timing.js";

/** #/jobs/ID, and #/jobs/ID?point=N */
export async function page(main, { id, search }, signal) {
  const state = new State(signal);
  state.job = await get(`/jobs/${id}`, signal);
  const log = logPanel(state);
  const results = h("div", { class: "results" });
  const follow = () =>
    live(
      state,
      log,
      () => load(state, results),
      (error) => results.prepend(failure(error)),
    );
  put(main, head(state, follow), log, results);
  document.title = `Job ${id}, ${state.job.model} – Bitfront`;
  state.heard = log.load(); // the last event in the log: the stream goes on behind it
  await load(state, results, Number(search.get("point")) || null);
  if (!ENDED.includes(state.job.state)) follow();
}

/** Name, state, progress and buttons. */
function head(state, resumed) {
  const title = h("h1", {});
  const [line, bar, acts, error] = [
    h("p", { class: "muted facts" }),
    progressBar(),
    h("div", { class: "acts" }),
    h("p", { class: "failure" }),
  ];
  let was = null;
  let stage = null;
  state.on(["job", "front"], () => {
    const { job, front } = state;
    title.textContent = job.model; // its name becomes known when a driver reads it
    put(line, badge(job), " ", factsOf(job, front));
    bar.show(ENDED.includes(job.state) ? null : job.progress);
    error.hidden = !job.error;
    error.textContent = job.error || "";
    if (job.progress && !ENDED.includes(job.state) && stage !== job.progress.stage)
      say((stage = job.progress.stage)); // not each step: readers would never stop
    const now = `${job.state} ${job.alive}`;
    if (was !== now)
      put(
        acts,
        actions(
          job,
          (changed) => (
            state.set({ job: { ...state.job, ...changed } }),
            ENDED.includes(changed.state) || resumed()
          ),
        ),
      );
    if (was && was !== now) say(`Job ${job.id} is ${job.state}.`);
    was = now;
  });
  return h("div", { class: "head" }, h("div", { class: "titlebar" }, title, acts), line, bar, error);
}

function factsOf(job, front) {
  const load = front?.workload;
  return [
    `Job ${job.id}`,
    [job.engine || "own kernels", job.device].filter(Boolean).join(" on "),
    `${job.points} point${job.points === 1 ? "" : "s"}`,
    load && `${load.batch} × ${load.context} tokens${load.prompt ? `, prompts of ${load.prompt}` : ""}`,
    front?.reference_perplexity && `unquantized perplexity ${digits(front.reference_perplexity)}`,
    `begun ${age(job.created_at)}${job.submitted_by ? ` by ${job.submitted_by}` : ""}`,
  ]
    .filter(Boolean)
    .join(" · ");
}

/** Read front and detail; build the panels when there is something to show. */
async function load(state, results, wanted = null) {
  const { id, points } = state.job;
  if (!points)
    return void put(
      results,
      h("p", { class: "empty" }, "Nothing is measured yet; points appear here as they are."),
    );
  const [front, detail] = await Promise.all([
    get(`/jobs/${id}/front`, state.signal).catch((error) => ({ error })),
    get(`/jobs/${id}/detail`, state.signal).catch(() => null), // not known yet
  ]);
  if (state.signal.aborted) return;
  if (front.error || !front.points.length) {
    if (!state.front)
      put(
        results,
        h(
          "p",
          { class: "empty" },
          front.error ? front.error.detail : "Nothing is measured yet; points appear here as they are.",
        ),
      );
    return;
  }
  const first = !state.front;
  const start = { front, detail: detail || state.detail };
  if (first) {
    const limits = Object.fromEntries(
      Object.entries(front.limits || {}).filter(([, limit]) => limit !== null),
    );
    const middle = front.points.filter((p) => p.on_front);
    const chosen =
      front.points.find((p) => p.id === wanted) || middle[Math.floor(middle.length / 2)] || front.points[0];
    Object.assign(start, { limits, a: chosen.id, shown: String(chosen.id) });
  }
  state.set(start);
  if (first) put(results, panels(state));
}

function panels(state) {
  const jump = (id) => {
    const section = document.getElementById(id);
    section.scrollIntoView({
      behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth",
    });
    section.heading.focus({ preventScroll: true });
  };
  const side = h("div", { class: "side" }, limitsPanel(state), solvePanel(state));
  const card = cardPanel(state, { compare: () => jump("compare"), exportIt: () => jump("export") });
  const all = [
    h("div", { class: "first" }, h("div", { class: "side" }, frontPanel(state), card), side),
    heatPanel(state),
    findingsPanel(state),
    comparePanel(state),
    h("div", { class: "pair" }, predictionPanel(state), timingPanel(state)),
    sensitivityPanel(state),
    tablePanel(state),
    exportPanel(state),
  ];
  const sections = all.flatMap((part) =>
    part.matches(".panel") ? [part] : [...part.querySelectorAll(".panel")],
  );
  const links = sections
    .filter((section) => section.id in SHORT)
    .map((section) => h("button", { class: "plain", onclick: () => jump(section.id) }, SHORT[section.id]));
  return [
    h("nav", { class: "contents", "aria-label": "On this page" }, links),
    ...all,
    h("p", { class: "muted method" }, prose(state.front.method || "")),
  ];
}

const SHORT = {
  front: "Front",
  chosen: "Point",
  heat: "Bits by layer",
  findings: "Findings",
  solve: "Other budgets",
  compare: "Compare",
  prediction: "Predictions",
  time: "Time",
  sensitivity: "Sensitivity",
  points: "All points",
  export: "Export",
};

/** Plain words on the controls; where a mix loses, that stands out. */
function findingsPanel(state) {
  const list = h("ul", { class: "findings" });
  const section = panel("Against the controls", { id: "findings" }, list);
  state.on(["front"], () =>
    put(
      list,
      state.front.findings.length
        ? state.front.findings.map((text) =>
            h(
              "li",
              { class: text.includes("LOSES MORE") || text.includes("MORE than the") ? "bad" : null },
              text,
            ),
          )
        : h("li", { class: "muted" }, "Nothing to say yet."),
    ),
  );
  return section;
}

function comparePanel(state) {
  const controls = h("div", { class: "controls" });
  const shown = h("div", {});
  const section = panel("Two points side by side", { id: "compare" }, controls, shown);
  const options = () => [
    ["", "none"],
    ...state.front.points.map((p) => [
      p.id,
      `point ${p.id}: ${bits(p.average_bits)} bits, KL ${kl(p.kl)}${p.control ? `, ${p.control}` : ""}`,
    ]),
  ];
  let asked = "";
  state.on(["front", "a", "b", "detail"], () => {
    const focused = controls.contains(document.activeElement) && document.activeElement.dataset.which;
    const choose = (which) =>
      select(
        options(),
        state[which] ?? "",
        (value) =>
          value && which === "a"
            ? state.choose(Number(value))
            : state.set({ [which]: value ? Number(value) : null }),
        { "data-which": which },
      );
    put(
      controls,
      labelled("A", choose("a")),
      labelled("B", choose("b")),
      state.a && state.b
        ? h(
            "a",
            { href: `#/compare?a=${state.job.id}:${state.a}&b=${state.job.id}:${state.b}` },
            "on a page of its own",
          )
        : null,
    );
    if (focused) controls.querySelector(`[data-which=${focused}]`).focus();
    if (!state.a || !state.b) return put(shown, h("p", { class: "muted" }, "Choose B to compare it with A."));
    if (asked === `${state.a} ${state.b}`) return;
    asked = `${state.a} ${state.b}`;
    comparison(shown, `${state.job.id}:${state.a}`, `${state.job.id}:${state.b}`, state.signal, state.detail);
  });
  return section;
}
