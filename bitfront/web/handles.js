// Marks of limits over the front: a line on an axis that can be dragged. They are a second way to set
// what the fields beside the figure set (and what a keyboard reaches there), so hidden from readers.

import { h } from "./dom.js";
import { QUANTITIES } from "./quantities.js";

/** Put the marks where the figure's axes are now. */
export function placeHandles(box, state, view) {
  box.handles ||= ["x", "y"].map((which) => make(box, state, which));
  box.handles.forEach((handle) => place(handle, box, state, view));
}

function make(box, state, which) {
  const shade = h("div", { class: `shade ${which}`, "aria-hidden": "true" });
  const grip = h("div", { class: `mark ${which}`, "aria-hidden": "true" }, h("span", { class: "tag" }));
  box.append(shade, grip);
  const handle = { which, shade, grip, to: null };
  grip.addEventListener("pointerdown", (event) => {
    grip.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  grip.addEventListener(
    "pointermove",
    (event) => grip.hasPointerCapture(event.pointerId) && handle.to?.(event),
  );
  return handle;
}

/** An axis's pixels: where it begins in the box, how long it is, pixel of a value, value of a pixel. */
function axisOf(box, which) {
  const found = box._fullLayout[`${which}axis`]; // not public, but what plotly's own examples use
  return {
    start: found._offset,
    length: found._length,
    pixel: (value) => found.d2p(value),
    value: (pixel) => found.p2d(pixel),
  };
}

function place(handle, box, state, view) {
  const { which, grip, shade } = handle;
  const name = view[which];
  const limited = Boolean(QUANTITIES[name].limit);
  grip.hidden = shade.hidden = !limited;
  if (!limited) return;
  const [axis, other] = [axisOf(box, which), axisOf(box, which === "x" ? "y" : "x")];
  const scale = view[`s${which}`];
  const limit = state.limits[name];
  const end = which === "x" ? axis.length : 0; // no limit: parked at the end of the axis
  const pixel = limit === undefined ? end : clamp(axis.pixel(limit / scale), 0, axis.length);
  lay(grip, shade, which, axis, other, pixel);
  shade.hidden = limit === undefined;
  grip.firstChild.textContent =
    limit === undefined ? QUANTITIES[name].limit.replace("Max", "max") : `≤ ${QUANTITIES[name].show(limit)}`;
  grip.classList.toggle("set", limit !== undefined);
  grip.classList.toggle("far", which === "x" && pixel > axis.length / 2);
  handle.to = (event) => drag(event, box, state, name, axis, scale, which);
}

function lay(grip, shade, which, axis, other, pixel) {
  const px = (value) => `${value}px`;
  if (which === "x") {
    Object.assign(grip.style, {
      left: px(axis.start + pixel),
      top: px(other.start),
      height: px(other.length),
    });
    Object.assign(shade.style, {
      left: px(axis.start + pixel),
      width: px(axis.length - pixel),
      top: px(other.start),
      height: px(other.length),
    });
  } else {
    Object.assign(grip.style, {
      top: px(axis.start + pixel),
      left: px(other.start),
      width: px(other.length),
    });
    Object.assign(shade.style, {
      top: px(axis.start),
      height: px(pixel),
      left: px(other.start),
      width: px(other.length),
    });
  }
}

function drag(event, box, state, name, axis, scale, which) {
  const edge = box.getBoundingClientRect();
  const pixel = (which === "x" ? event.clientX - edge.left : event.clientY - edge.top) - axis.start;
  const beyond = which === "x" ? pixel >= axis.length - 2 : pixel <= 2;
  const limits = { ...state.limits };
  if (beyond) delete limits[name];
  else limits[name] = Number((axis.value(clamp(pixel, 0, axis.length)) * scale).toPrecision(4)); // as it is shown
  state.set({ limits });
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
