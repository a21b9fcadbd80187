// The list of jobs, newest first, as it changes.

import { get, post, query, wait } from "./api.js";
import { failure, h, labelled, put, say, select } from "./dom.js";
import { age } from "./format.js";
import { badge, progressBar } from "./progress.js";

const STATES = [["", "any state"], "queued", "running", "done", "failed", "cancelled"];
const BUSY_S = 2;
const IDLE_S = 15;
const PAGE = 50;

/** #/jobs */
export async function page(main, { search }, signal) {
  const view = {
    state: search.get("state") || "",
    model: search.get("model") || "",
    limit: PAGE,
    rows: new Map(),
  };
  const list = h("ul", { class: "jobs" });
  const note = h("p", { class: "muted" });
  const more = h("button", { hidden: true, onclick: () => ((view.limit += PAGE), refresh()) }, "Older jobs");
  const refresh = () =>
    load(view, list, note, more, signal).catch((error) => !signal.aborted && put(note, failure(error)));
  put(
    main,
    h(
      "div",
      { class: "titlebar" },
      h("h1", {}, "Jobs"),
      h("a", { class: "button primary", href: "#/submit" }, "New job"),
    ),
    filters(view, refresh),
    columns(),
    list,
    note,
    more,
  );
  await refresh();
  poll(view, refresh, signal);
}

function filters(view, refresh) {
  let typing;
  const model = h("input", {
    type: "search",
    value: view.model,
    placeholder: "part of its name",
    oninput: () => {
      clearTimeout(typing);
      typing = setTimeout(() => ((view.model = model.value.trim()), refresh()), 250);
    },
  });
  const state = select(STATES, view.state, (value) => ((view.state = value), refresh()));
  return h(
    "form",
    { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
    labelled("Model", model),
    labelled("State", state),
  );
}

const columns = () =>
  h(
    "div",
    { class: "jobs-head", "aria-hidden": "true" },
    ["#", "Model", "State", "Engine", "Points", "Age", ""].map((text) => h("span", {}, text)),
  );

async function load(view, list, note, more, signal) {
  view.latest = (view.latest || 0) + 1;
  const mine = view.latest;
  const found = await pages(view, signal);
  if (mine !== view.latest || signal.aborted) return; // an answer to a question asked since
  view.jobs = found.jobs;
  draw(view, list);
  more.hidden = found.next === null;
  put(
    note,
    found.jobs.length
      ? null
      : view.state || view.model
        ? "No job is like that."
        : "No jobs yet. Start one: New job.",
  );
}

/** As many jobs as are wanted, a page at a time: the API gives no more at once. */
async function pages(view, signal) {
  const jobs = [];
  let next = null;
  do {
    const asked = { limit: PAGE, before: next, state: view.state, model: view.model };
    const found = await get(`/jobs${query(asked)}`, signal);
    jobs.push(...found.jobs);
    next = found.next ?? null;
  } while (next !== null && jobs.length < view.limit);
  return { jobs, next };
}

/** Rows are kept and changed, not made anew: focus stays where it is. */
function draw(view, list) {
  const rows = view.jobs.map((job) => {
    const row = view.rows.get(job.id) || makeRow(job.id, view, list);
    view.rows.set(job.id, row);
    row.show(job);
    return row;
  });
  if (rows.length !== list.children.length || rows.some((row, i) => list.children[i] !== row))
    put(list, rows);
}

function makeRow(id, view, list) {
  const cells = {
    model: h("a", { class: "model", href: `#/jobs/${id}` }),
    state: h("div", { class: "state" }),
    bar: progressBar(),
    error: h("p", { class: "error" }),
  };
  const facts = ["engine", "points", "age"].map((name) => h("span", { class: name }));
  const acts = h("span", { class: "acts" });
  const row = h(
    "li",
    {},
    h("span", { class: "id" }, `${id}`),
    h("div", {}, cells.model, cells.bar, cells.error),
    cells.state,
    facts,
    acts,
  );
  let was = null;
  row.show = (job) => {
    cells.model.textContent = job.model;
    cells.bar.show(job.state === "running" ? job.progress : null);
    cells.error.hidden = !job.error;
    cells.error.textContent = job.error || "";
    put(cells.state, badge(job));
    facts[0].textContent = [job.engine || "own kernels", job.device].filter(Boolean).join(" on ");
    facts[1].textContent = `${job.points} point${job.points === 1 ? "" : "s"}`;
    facts[2].textContent = age(job.created_at) + (job.submitted_by ? `, ${job.submitted_by}` : "");
    if (was !== `${job.state} ${job.alive}`)
      put(
        acts,
        actions(job, (changed) => changedTo(changed, view, list)),
      );
    was = `${job.state} ${job.alive}`;
  };
  return row;
}

function changedTo(job, view, list) {
  view.jobs = view.jobs.map((other) => (other.id === job.id ? { ...other, ...job } : other));
  draw(view, list);
}

/** The buttons that a job's state leaves: cancel while it may run, resume where it stopped. */
export function actions(job, changed) {
  const act = (verb, text) => {
    const button = h(
      "button",
      {
        "aria-label": `${text} job ${job.id}`,
        onclick: async () => {
          button.disabled = true;
          try {
            changed(await post(`/jobs/${job.id}/${verb}`));
            say(`Job ${job.id}: ${verb === "cancel" ? "cancelled" : "resumed"}.`);
          } catch (error) {
            button.disabled = false;
            button.after(failure(error));
          }
        },
      },
      text,
    );
    return button;
  };
  const stalled = job.state === "running" && job.alive === false;
  const open = job.state === "running" || job.state === "queued";
  return [
    open ? act("cancel", "Cancel") : null,
    stalled || job.state === "failed" || job.state === "cancelled" ? act("resume", "Resume") : null,
  ];
}

/** Ask again: often while something runs, rarely else, and not while nobody looks. */
async function poll(view, refresh, signal) {
  try {
    for (;;) {
      const busy = view.jobs?.some((job) => job.state === "running" || job.state === "queued");
      await wait(busy ? BUSY_S : IDLE_S, signal);
      if (!document.hidden) await refresh();
    }
  } catch {
    // another page is shown
  }
}
