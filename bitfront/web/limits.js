// Limits: a field and a slider for each resource, and the best point within all of them.

import { h, newId, panel, put, say } from "./dom.js";
import { bits, bytes, kl } from "./format.js";
import { best, has, known, QUANTITIES } from "./quantities.js";

const STEPS = 1000;

/** The panel beside the front. Whoever sets a limit sees the best point chosen at once. */
export function limitsPanel(state) {
  const rows = h("div", { class: "limits" });
  const answer = h("p", { class: "answer", "aria-live": "polite" });
  const clear = h("button", { class: "plain", onclick: () => state.set({ limits: {} }) }, "No limits");
  const section = panel(
    "Limits",
    {
      wide: false,
      id: "limits",
      note: "The least KL within them; with a limit on the KL, the fewest bytes.",
    },
    rows,
    answer,
    clear,
  );
  let names = "";
  state.on(["front"], () => {
    const found = known(state.front.points).filter((name) => QUANTITIES[name].limit);
    if (names === found.join()) return;
    names = found.join();
    put(
      rows,
      found.map((name) => row(state, name)),
    );
  });
  let before = state.limits;
  state.on(["front", "limits"], () => {
    const found = best(state.front.points, state.limits);
    put(answer, told(found, state));
    clear.disabled = !Object.keys(state.limits).length;
    if (before !== state.limits && found.point) state.choose(found.point.id);
    before = state.limits;
  });
  return section;
}

function told({ point, why }, state) {
  if (!point) return h("span", { class: "bad" }, why);
  const limited = Object.keys(state.limits).length > 0;
  const text = `${bits(point.average_bits)} bits, ${bytes(QUANTITIES.weight_bytes.of(point))}, KL ${kl(point.kl)} (${kl(point.kl_low)} to ${kl(point.kl_high)})`;
  const choose = h(
    "button",
    { class: "plain best", "data-point": point.id, onclick: () => state.choose(point.id) },
    `point ${point.id}`,
  );
  return [limited ? "Best: " : "Least KL of all: ", choose, ` – ${text}`];
}

function row(state, name) {
  const quantity = QUANTITIES[name];
  const id = newId("limit");
  const text = h("input", {
    id,
    type: "text",
    inputmode: "text",
    placeholder: `none (${quantity.example})`,
    autocomplete: "off",
    spellcheck: "false",
    "data-limit": name,
  });
  const slider = h("input", { type: "range", min: 0, max: STEPS, "aria-label": `${quantity.limit}, slider` });
  const error = h("p", { class: "error", id: `${id}-e`, hidden: true });
  text.setAttribute("aria-describedby", error.id);
  const change = (value) => {
    const limits = { ...state.limits };
    if (value === null) delete limits[name];
    else limits[name] = value;
    state.set({ limits });
  };
  text.addEventListener("input", () => {
    const value = text.value.trim() === "" ? null : quantity.parse(text.value);
    error.hidden = value !== null || text.value.trim() === "";
    if (!error.hidden) error.textContent = `Write it like ${quantity.example}.`;
    else change(value);
  });
  slider.addEventListener("input", () => change(ofSlider(state, name, Number(slider.value))));
  slider.addEventListener("change", () => say(slider.getAttribute("aria-valuetext")));
  state.on(["limits", "front"], () => show(state, name, text, slider, error));
  return h("div", { class: "limit" }, h("label", { for: id }, quantity.limit), text, slider, error);
}

function show(state, name, text, slider, error) {
  const limit = state.limits[name];
  const shown = limit === undefined ? "" : QUANTITIES[name].show(limit).replace("−", "-"); // a minus that can be typed
  // what somebody types stays as they type it
  if (document.activeElement !== text) {
    text.value = shown;
    error.hidden = true;
  }
  slider.value = toSlider(state, name, limit);
  slider.setAttribute("aria-valuetext", limit === undefined ? "no limit" : `at most ${shown}`);
}

function range(state, name) {
  const values = state.front.points.filter((p) => has(name, p)).map(QUANTITIES[name].of);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return QUANTITIES[name].log
    ? [Math.log(Math.max(low, 1e-9)), Math.log(Math.max(high, 1e-9)), Math.exp, Math.log]
    : [low, high, (v) => v, (v) => v];
}

/** The slider's right end is no limit; a step above the least value is its left end. */
function ofSlider(state, name, step) {
  if (step >= STEPS) return null;
  const [low, high, out] = range(state, name);
  const value = out(low + (high - low || Math.abs(low) || 1) * (step / (STEPS - 1)));
  return Number(value.toPrecision(4)) >= out(low) ? Number(value.toPrecision(4)) : value;
}

function toSlider(state, name, limit) {
  if (limit === undefined) return STEPS;
  const [low, high, , into] = range(state, name);
  return Math.round((STEPS - 1) * Math.min(Math.max((into(limit) - low) / (high - low || 1), 0), 1));
}
