// plotly: loaded when the first figure wants it (it has 5 MB), and dressed in the page's colours.

import { h } from "./dom.js";
import { color, onTheme } from "./theme.js";

let loading = null;

/** The library, once. */
export function plotly() {
  loading ||= new Promise((resolve, reject) => {
    const script = h("script", {
      src: "/web/plotly.min.js",
      onload: () => resolve(window.Plotly),
      onerror: () => reject(new Error("The figure library can't be loaded: /web/plotly.min.js.")),
    });
    document.head.append(script);
  });
  return loading;
}

/** Text that plotly takes for text: it knows a few tags. */
export const plain = (text) =>
  String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

/** A box for a figure. `box.draw(() => ({data, layout}))` draws it, and again when colours change. */
export function figure(label, signal) {
  const box = h("div", { class: "figure", role: "img", "aria-label": label });
  let make = null;
  let queued = false;
  const now = async () => {
    const Plotly = await plotly();
    queued = false;
    if (signal.aborted || !make) return;
    const { data, layout } = make();
    await Plotly.react(box, data, dressed(layout), { displayModeBar: false, responsive: true });
    box.dispatchEvent(new Event("drawn"));
  };
  box.draw = (making) => {
    make = making;
    if (queued) return; // many changes in one moment are drawn once
    queued = true;
    requestAnimationFrame(() => now().catch((error) => (box.textContent = error.message)));
  };
  onTheme(() => make && box.draw(make), signal);
  signal.addEventListener("abort", () => window.Plotly?.purge(box), { once: true });
  return box;
}

/** A layout with the page's colours and margins. */
function dressed(layout) {
  const grid = {
    gridcolor: color("line"),
    linecolor: color("line-strong"),
    zeroline: false,
    ticks: "outside",
    ticklen: 4,
    tickcolor: color("line-strong"),
    automargin: true,
  };
  const label = {
    bgcolor: color("panel"),
    bordercolor: color("line-strong"),
    font: { color: color("ink"), size: 13, family: "system-ui, sans-serif" },
    align: "left",
  };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("ink"), size: 13, family: "system-ui, sans-serif" },
    hoverlabel: label,
    margin: { l: 60, r: 16, t: 12, b: 48 },
    // a finger that scrolls the page shouldn't zoom the figure
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...layout,
    xaxis: { ...grid, ...layout.xaxis },
    yaxis: { ...grid, ...layout.yaxis },
  };
}

/** An axis of a quantity: decades marked by their powers where it is logarithmic. */
export function axis(title, log) {
  return {
    title: { text: title, standoff: 8 },
    ...(log
      ? {
          type: "log",
          dtick: 1,
          minor: { showgrid: true, gridcolor: color("line-faint"), dtick: "D1" },
          exponentformat: "none",
        }
      : { type: "linear" }),
  };
}
