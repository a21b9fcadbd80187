// Elements without innerHTML: whatever the server says becomes text, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element: `h("p", {class: "muted"}, "text", child)`; `on…` are listeners, null is left out. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** Replace an element's children. */
export function put(element, ...children) {
  element.replaceChildren(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** Say something to who can't see it. */
export function say(text) {
  document.getElementById("said").textContent = text;
}

let last = 0;
/** An id that no other element has. */
export const newId = (stem) => `${stem}-${++last}`;

/** Plain words in which `names` are marked as in Markdown. */
export const prose = (text) =>
  String(text)
    .split("`")
    .map((part, i) => (i % 2 ? h("code", {}, part) : part));

/** A label above its control, with a hint and room for an error below. */
export function field(label, control, { hint = null, wide = false } = {}) {
  control.id ||= newId("f");
  const error = h("p", { class: "error", id: `${control.id}-e`, hidden: true });
  const help = hint && h("p", { class: "hint", id: `${control.id}-h` }, prose(hint));
  control.setAttribute("aria-describedby", `${hint ? help.id : ""} ${error.id}`.trim());
  const box = h(
    "div",
    { class: wide ? "field wide" : "field" },
    h("label", { for: control.id }, label),
    control,
    help,
    error,
  );
  box.fail = (text) => {
    error.hidden = !text;
    error.textContent = text || "";
    if (text) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
  };
  return box;
}

/** A label in front of its control, on one line. */
export function labelled(text, control) {
  control.id ||= newId("c");
  return h("span", { class: "labelled" }, h("label", { for: control.id }, text), control);
}

/** A section with a heading: returns it with `body`, which is drawn into. */
export function panel(title, { note = null, id = null, wide = true } = {}, ...children) {
  const body = h("div", { class: "body" }, ...children);
  const heading = h("h2", { tabindex: "-1" }, title);
  const section = h(
    "section",
    { class: wide ? "panel wide" : "panel", id, "aria-label": title },
    heading,
    note && h("p", { class: "note" }, note),
    body,
  );
  return Object.assign(section, { body, heading });
}

/** A choice: options are values, or [value, text]. */
export function select(options, chosen, onchange, attributes = {}) {
  const pairs = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  const element = h(
    "select",
    attributes,
    pairs.map(([value, text]) => h("option", { value }, text)),
  );
  element.value = chosen ?? pairs[0]?.[0] ?? "";
  element.addEventListener("change", () => onchange?.(element.value));
  return element;
}

/** A box to tick, inside its label. */
export function tick(text, checked, onchange) {
  const input = h("input", { type: "checkbox", checked, onchange: () => onchange?.(input.checked) });
  return Object.assign(h("label", { class: "tick" }, input, h("span", {}, text)), { input });
}

/** What a page shows of an error. */
export const failure = (error) =>
  h("p", { class: "failure", role: "alert" }, error.detail || error.message || String(error));
