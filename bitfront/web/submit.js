// A new job: the form, its body as text, and what the server says is wrong with it.

import { get, post } from "./api.js";
import { takeDraft } from "./draft.js";
import { failure, h, labelled, newId, panel, put, say, select } from "./dom.js";
import { bind, fieldsOf, resolve, withAt } from "./schema.js";
import { fromYaml, toYaml } from "./yaml.js";

/** What most jobs say; all else is under More. */
const COMMON = ["model", "menu", "budgets", "quantizer", "estimators", "serving", "texts", "refinement"];

/** #/submit */
export async function page(main, { search }, signal) {
  const [root, { menus }, engines, devices] = await Promise.all([
    get("/schema", signal),
    get("/menus", signal),
    namesOf("/engines", signal),
    namesOf("/devices", signal),
  ]);
  const draft = takeDraft() || (search.get("model") ? { model: search.get("model") } : {});
  const form = {
    root,
    body: draft,
    fields: new Map(),
    open: ["serving"],
    special: {},
    lists: { "serving.engine": engines, "serving.device": devices },
    listeners: [],
    key: newKey(),
  };
  form.special.menu = (node, path, hint) => menuField(form, menus, path, hint);
  form.set = (path, value) => replace(form, withAt(form.body, path, value));
  const schema = resolve(root, root);
  const common = COMMON.filter((name) => schema.properties[name]);
  const more = Object.keys(schema.properties).filter((name) => !common.includes(name));
  const outcome = h("div", { class: "outcome", tabindex: "-1" });
  const button = h("button", { class: "primary" }, "Start the job");
  const element = h(
    "form",
    {
      class: "panel",
      novalidate: true,
      onsubmit: (event) => (event.preventDefault(), send(form, button, outcome)),
    },
    h("div", { class: "fields" }, fieldsOf(schema, form, [], common)),
    more.length
      ? h(
          "details",
          { class: "group wide" },
          h("summary", {}, "More"),
          h("div", { class: "fields" }, fieldsOf(schema, form, [], more)),
        )
      : null,
    h("div", { class: "send" }, button),
    outcome,
  );
  put(main, h("h1", {}, "New job"), h("div", { class: "submit" }, element, textPanel(form)));
}

/** Names for suggestions, whatever the list looks like; none where there is no such list. */
async function namesOf(path, signal) {
  const found = await get(path, signal).catch(() => ({}));
  const list = Array.isArray(found) ? found : Object.values(found)[0] || [];
  return Array.isArray(list)
    ? list.map((entry) => entry.name ?? entry).filter((name) => typeof name === "string")
    : Object.keys(list);
}

/** Names a submission, so that one whose answer got lost isn't a second job when it is sent again. */
const newKey = () =>
  Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("-");

/** Another body: the fields that aren't being typed in show it, and so does the text. */
function replace(form, body) {
  form.body = body;
  form.key = newKey();
  form.fields.forEach((known) => known.write());
  form.listeners.forEach((listener) => listener());
}

/** The menu: a shipped one, a list of formats, or an object with rules (which the text edits). */
function menuField(form, menus, path, hint) {
  const names = Object.keys(menus);
  const kind = select(
    [["", "default"], ...names, ["own", "a list of formats …"], ["rules", "with rules (see the text)"]],
    "",
    null,
  );
  kind.querySelector("[value=rules]").disabled = true; // shown, not chosen: the text has the rules
  const note = h("p", { class: "hint" });
  const formats = h("input", {
    type: "text",
    spellcheck: "false",
    placeholder: "int4-g64, int8-channel, bf16",
    "aria-label": "Formats, with commas",
    hidden: true,
  });
  const parts = () =>
    formats.value
      .split(",")
      .map((part) => part.trim())
      .filter(Boolean);
  const write = (value) => {
    const own = Array.isArray(value);
    kind.value = own
      ? "own"
      : value && typeof value === "object"
        ? "rules"
        : names.includes(value)
          ? value
          : "";
    formats.hidden = !own;
    if (own && document.activeElement !== formats) formats.value = value.join(", ");
    const schemes = own ? null : value && typeof value === "object" ? value.schemes : menus[value]?.schemes;
    note.textContent = schemes ? schemes.join(", ") : "";
  };
  const read = () =>
    kind.value === "own"
      ? parts().length
        ? parts()
        : menus[form.body.menu]?.schemes || ["int4-g64", "int8-g64", "bf16"]
      : kind.value || undefined;
  formats.addEventListener("input", () => form.set(path, parts()));
  const box = bind({ control: kind, read, write }, form, path, "Menu", hint);
  form.fields.get("menu").write = () => write(form.body.menu);
  box.append(formats, note);
  return box;
}

/** The same body as text; what is typed there goes into the form when it can be read. */
function textPanel(form) {
  const view = { kind: "json" };
  const id = newId("body");
  const text = h("textarea", { id, rows: 22, spellcheck: "false", class: "code" });
  const error = h("p", { class: "error", role: "status" });
  const write = (always) => {
    if (always || document.activeElement !== text)
      text.value = view.kind === "json" ? JSON.stringify(form.body, null, 2) : toYaml(form.body);
  };
  text.addEventListener("input", () => {
    try {
      const body = view.kind === "json" ? JSON.parse(text.value) : fromYaml(text.value);
      if (!body || typeof body !== "object" || Array.isArray(body))
        throw new Error("a job is an object with fields");
      error.textContent = "";
      replace(form, body);
    } catch (problem) {
      error.textContent = `Not readable yet: ${problem.message}`;
    }
  });
  form.listeners.push(() => write(false));
  write(true);
  const kind = select(
    [
      ["json", "JSON"],
      ["yaml", "YAML"],
    ],
    view.kind,
    (value) => ((view.kind = value), (error.textContent = ""), write(true)),
  );
  const copy = h(
    "button",
    {
      type: "button",
      class: "plain",
      onclick: () => navigator.clipboard?.writeText(text.value).then(() => say("Copied.")),
    },
    "Copy",
  );
  return panel(
    "As text",
    { wide: false, note: "The same job; edit either." },
    h("div", { class: "controls" }, labelled("As", kind), copy),
    h("label", { for: id, class: "unseen" }, "The job's body"),
    text,
    error,
  );
}

async function send(form, button, outcome) {
  form.fields.forEach(({ box, unread }) => box.fail(unread ?? null));
  put(outcome);
  if ([...form.fields.values()].some(({ unread }) => unread)) {
    document.querySelector(".submit [aria-invalid=true]")?.focus();
    return;
  }
  button.disabled = true;
  try {
    const job = await post("/jobs", form.body, { "Idempotency-Key": form.key });
    say(`Job ${job.id} is ${job.state}.`);
    location.hash = `#/jobs/${job.id}`;
  } catch (error) {
    button.disabled = false;
    put(outcome, failure(error));
    const left = (error.errors || []).filter((entry) => !atItsField(form, entry));
    if (left.length)
      outcome.append(
        h(
          "ul",
          { class: "error" },
          left.map((entry) => h("li", {}, `${entry.loc.join(".")}: ${entry.msg}`)),
        ),
      );
    (document.querySelector(".submit [aria-invalid]") || outcome).focus();
  }
}

/** Show an error at the field that it is of, or at the one around it. */
function atItsField(form, { loc, msg }) {
  const path = loc[0] === "body" ? loc.slice(1) : loc;
  for (let length = path.length; length > 0; length -= 1) {
    const known = form.fields.get(path.slice(0, length).join("."));
    if (!known) continue;
    const inside = path.slice(length).join(".");
    known.box.fail(inside ? `${inside}: ${msg}` : msg);
    for (let box = known.box.closest("details"); box; box = box.parentElement.closest("details"))
      box.open = true;
    return true;
  }
  return false;
}
