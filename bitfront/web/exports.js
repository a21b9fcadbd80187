// Exports of a point: choose targets, wait, download.

import { download, get, post, wait } from "./api.js";
import { failure, h, panel, prose, put, say, tick } from "./dom.js";
import { age, bytes, kl } from "./format.js";

const POLL_S = 2;
const OPEN = ["queued", "running"];

/** The panel: a form for the chosen point, and the job's exports. */
export function exportPanel(state) {
  const form = h("form", { class: "stack" });
  const list = h("div", {});
  const section = panel("Export", { id: "export" }, form, list);
  const view = { exports: [], targets: null, polling: false };
  const refresh = () => watch(state, view, list);
  fill(state, form, view, refresh).catch((error) => put(form, failure(error)));
  let was = null;
  state.on(["job"], () => {
    if (was !== state.job.state) refresh(); // not at every step of its progress
    was = state.job.state;
  });
  return section;
}

async function fill(state, form, view, refresh) {
  view.targets = (await get("/exports/targets", state.signal)).targets;
  const ticks = view.targets.map((target) => [
    target.name,
    tick(
      [
        h("b", {}, target.name),
        " – ",
        prose(target.what || ""),
        target.needs_model ? "" : " (needs no model)",
      ],
      false,
    ),
  ]);
  const button = h("button", { class: "primary" }, "Export");
  const error = h("div", {});
  put(
    form,
    h(
      "fieldset",
      {},
      h("legend", {}, "To"),
      ticks.map(([, box]) => box),
    ),
    button,
    error,
  );
  state.on(["a"], () => {
    button.disabled = state.a === null;
    button.textContent = state.a === null ? "Choose a point first" : `Export point ${state.a}`;
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const targets = ticks.filter(([, box]) => box.input.checked).map(([name]) => name);
    if (!targets.length) return put(error, failure(new Error("Tick at least one target.")));
    put(error);
    button.disabled = true;
    try {
      await post(`/jobs/${state.job.id}/points/${state.a}/exports`, { targets });
      say(`Export of point ${state.a} asked for.`);
      refresh();
    } catch (problem) {
      put(error, failure(problem));
    }
    button.disabled = false;
  });
}

/** Draw the exports, again while one is on its way. */
async function watch(state, view, list) {
  if (view.polling) return (view.again = true);
  view.polling = true;
  try {
    do {
      view.again = false;
      view.exports = (await get(`/jobs/${state.job.id}/exports`, state.signal)).exports;
      put(
        list,
        view.exports.length
          ? h("ul", { class: "exports" }, [...view.exports].sort((a, b) => b.id - a.id).map(one))
          : null,
      );
      if (view.exports.some((entry) => OPEN.includes(entry.state))) await wait(POLL_S, state.signal);
      else if (!view.again) break;
    } while (!state.signal.aborted);
  } catch (error) {
    if (!state.signal.aborted) put(list, failure(error));
  }
  view.polling = false;
}

function one(entry) {
  const results = (entry.result || []).map((r) =>
    [
      r.target,
      r.weight_bytes && bytes(r.weight_bytes),
      r.reloaded_kl === undefined || r.reloaded_kl === null
        ? null
        : `KL ${kl(r.reloaded_kl)} read back${r.measured_kl === undefined || r.measured_kl === null ? "" : `, ${kl(r.measured_kl)} measured`}`,
    ]
      .filter(Boolean)
      .join(", "),
  );
  return h(
    "li",
    {},
    h(
      "p",
      {},
      h("b", {}, `Point ${entry.point}`),
      ` to ${entry.targets.join(", ")} `,
      h("span", { class: `badge ${entry.state}`, role: "status" }, entry.state),
      h("span", { class: "muted" }, ` ${age(entry.created_at)}`),
    ),
    entry.error && h("p", { class: "error" }, entry.error),
    results.map((text) => h("p", { class: "muted" }, text)),
    h(
      "ul",
      { class: "files" },
      entry.files.map((file) => h("li", {}, fileButton(entry, file))),
    ),
  );
}

function fileButton(entry, file) {
  const path = `/exports/${entry.id}/files/${file.name.split("/").map(encodeURIComponent).join("/")}`;
  const button = h(
    "button",
    {
      class: "plain",
      onclick: () =>
        download(path, file.name.split("/").pop()).catch(
          (error) => error.name !== "AbortError" && button.after(failure(error)),
        ),
    },
    `${file.name} (${bytes(file.bytes)})`,
  );
  return button;
}
