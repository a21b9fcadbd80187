// How far a job is: its state, a bar, the stage and the time left.

import { h, put } from "./dom.js";
import { duration, percent } from "./format.js";

const WORDS = {
  queued: "queued",
  running: "running",
  done: "done",
  failed: "failed",
  cancelled: "cancelled",
};

/** The state in a word and a colour; a running job without a driver is said to be stalled. */
export function badge(job) {
  const stalled = job.state === "running" && job.alive === false;
  const text = stalled ? "running, but its driver is gone" : WORDS[job.state] || job.state;
  return h("span", { class: `badge ${stalled ? "failed" : job.state}` }, text);
}

/** A bar that `show(progress)` moves. */
export function progressBar() {
  const bar = h("div", { class: "fill" });
  const track = h(
    "div",
    {
      class: "track",
      role: "progressbar",
      "aria-label": "progress of the whole job",
      "aria-valuemin": 0,
      "aria-valuemax": 100,
    },
    bar,
  );
  const text = h("div", { class: "stage muted" });
  const box = h("div", { class: "progress" }, track, text);
  box.show = (progress) => {
    box.hidden = !progress;
    if (!progress) return;
    const share = Math.min(Math.max(progress.share ?? 0, 0), 1);
    bar.style.width = `${100 * share}%`;
    track.setAttribute("aria-valuenow", Math.round(100 * share));
    put(text, sentence(progress, share));
  };
  box.show(null);
  return box;
}

function sentence(progress, share) {
  const left =
    progress.left_s === null || progress.left_s === undefined
      ? ""
      : ` · about ${duration(progress.left_s)} left`;
  const steps = progress.steps > 1 ? ` ${progress.done}/${progress.steps}` : "";
  return `${percent(share)} · ${progress.stage}${steps}${left}`;
}
