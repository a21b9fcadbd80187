// What a job said: all lines so far, then those that its events bring.

import { fetchApi, query } from "./api.js";
import { h, put } from "./dom.js";
import { duration } from "./format.js";

/** A box that is open while the job runs. `add` and `stage` take events; `load()` reads what was said
 *  before, and gives the number of the last event in it, so that the stream begins behind it. */
export function logPanel(state) {
  const lines = h("pre", {
    class: "log",
    tabindex: "0",
    role: "log",
    "aria-live": "off",
    "aria-label": "Log of the job",
  });
  const box = h("details", { class: "panel wide logbox" }, h("summary", {}, "Log"), lines);
  box.open = ["running", "failed"].includes(state.job.state);
  const append = (time, level, text) => {
    const atEnd = lines.scrollTop + lines.clientHeight >= lines.scrollHeight - 8;
    const said = level === "info" ? text : `${level}: ${text}`;
    lines.append(h("span", { class: `line ${level}` }, `${time}  ${said}\n`));
    if (atEnd) lines.scrollTop = lines.scrollHeight; // who scrolled up reads
  };
  const clock = (at) => (at || new Date().toISOString()).slice(11, 19);
  box.add = ({ level, text, at }) => append(clock(at), level, text);
  box.stage = ({ label, seconds, at }) =>
    append(
      clock(at),
      "stage",
      `${label}: ${seconds === null || seconds === undefined ? "begins" : duration(seconds)}`,
    );
  box.load = () =>
    load(state, append).catch(
      () => void put(lines, h("span", { class: "line muted" }, "No log is kept of this job.\n")),
    );
  return box;
}

/** Page by page, if the server says where the next one begins (X-Next). */
async function load(state, append) {
  let after = null;
  for (;;) {
    const response = await fetchApi(`/jobs/${state.job.id}/logs${query({ after })}`, {
      signal: state.signal,
    });
    const lines = (await response.text()).split("\n").filter(Boolean);
    for (const line of lines) {
      const [, time, level, said] = /^\d+-\d+-\d+T([\d:]+)\S*\s+(\w+)\s+(.*)$/.exec(line) || [
        null,
        "        ",
        "info",
        line,
      ];
      append(time, level, said);
    }
    const next = response.headers.get("X-Next");
    if (next === null || next === after || !lines.length) return next ?? after;
    after = next;
  }
}
