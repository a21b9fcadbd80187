// A form from a JSON Schema: a field for each property, which reads and writes a body.

import { field, h, newId, select } from "./dom.js";
import { parseBytes, parseNumber, parseSeconds } from "./format.js";

/** A node with its $ref followed and `null` among its alternatives taken for "may be left out". */
export function resolve(node, root) {
  const { $ref, ...own } = node;
  if ($ref) {
    const found = $ref
      .slice(2)
      .split("/")
      .reduce((part, key) => part[key], root);
    return resolve({ ...found, ...own }, root); // the class's words are more general
  }
  const options = (node.anyOf || node.oneOf || []).filter((option) => option.type !== "null");
  if (options.length === 1) return resolve({ ...options[0], ...without(node, ["anyOf", "oneOf"]) }, root);
  return node.allOf?.length === 1
    ? resolve({ ...node.allOf[0], ...without(node, ["allOf"]) }, root)
    : { ...node };
}

const without = (node, names) =>
  Object.fromEntries(Object.entries(node).filter(([name]) => !names.includes(name)));

/** The value at a path of a body. */
export const at = (body, path) => path.reduce((part, key) => part?.[key], body);

/** A body with a value at a path, or without it (undefined); objects that become empty go, too. */
export function withAt(body, [key, ...rest], value) {
  const copy = { ...(body && typeof body === "object" && !Array.isArray(body) ? body : {}) };
  const inner = rest.length ? withAt(copy[key], rest, value) : value;
  if (inner === undefined || (rest.length && !Object.keys(inner).length)) delete copy[key];
  else copy[key] = inner;
  return copy;
}

const first = (text = "") => text.split(/\n\n?Args:/)[0].trim();
/** With a capital, unless it begins with a list of names. */
const sentence = (text) => (/^[\w-]+,/.test(text) ? text : text.charAt(0).toUpperCase() + text.slice(1));
const words = (name) =>
  sentence(name)
    .replaceAll("_", " ")
    .replace(/ bytes$/, name.startsWith("max_") ? "" : ", bytes")
    .replace(/ s$/, " latency");

/** The fields of an object's properties. `form` = {root, body, fields, change(), lists}. */
export function fieldsOf(node, form, path = [], names = null) {
  return (names || Object.keys(node.properties))
    .filter((name) => node.properties[name])
    .map((name) => {
      const child = resolve(node.properties[name], form.root);
      child.default ??= node.default?.[name]; // an object's default is that of its fields
      const hint = sentence(
        first(node.properties[name].description || (child.properties ? child.description : "")),
      );
      const required = node.required?.includes(name) && !path.length;
      return one(child, form, [...path, name], hint, required);
    });
}

function one(node, form, path, hint, required) {
  const name = path[path.length - 1];
  if (form.special[path.join(".")]) return form.special[path.join(".")](node, path, hint);
  if (node.properties) {
    const inside = h("div", { class: "fields" }, fieldsOf(node, form, path));
    return h(
      "details",
      { class: "group wide", open: form.open.includes(path.join(".")) },
      h("summary", {}, words(name)),
      hint && h("p", { class: "hint" }, hint),
      inside,
    );
  }
  return bind(widget(node, form, path, required), form, path, words(name), hint);
}

/** Put a widget {control, read, write} into the form under a label. */
export function bind({ control, read, write, wide }, form, path, label, hint) {
  const box = field(label, control, { hint, wide });
  const known = {
    box,
    control,
    write: () => document.activeElement !== control && write(at(form.body, path)),
  };
  control.addEventListener(control.matches("select, [type=checkbox]") ? "change" : "input", () => {
    try {
      const value = read();
      known.unread = null;
      box.fail(null);
      form.set(path, value);
    } catch (error) {
      known.unread = error.message; // nothing is sent while this stands in the field
      box.fail(error.message);
    }
  });
  form.fields.set(path.join("."), known);
  write(at(form.body, path));
  return box;
}

/** The control that fits a node's type: read gives a value or undefined, and throws plain words. */
function widget(node, form, path, required) {
  const choices = node.enum || (node.const !== undefined ? [node.const] : null);
  if (choices) return choice(node, choices);
  if (node.type === "boolean") return yesNo(node);
  if (node.type === "integer" || node.type === "number") return number(node, path[path.length - 1]);
  if (node.type === "string") return text(node, form.lists[path.join(".")], required);
  if (node.type === "array" && !resolve(node.items || {}, form.root).properties)
    return list(node, resolve(node.items || {}, form.root), form.lists[path.join(".")]);
  return json(node);
}

function usual(node) {
  const value = Array.isArray(node.default) ? node.default.join(", ") : node.default;
  return value === undefined || value === null || value === "" || typeof value === "object"
    ? ""
    : `default: ${value}`;
}

function choice(node, choices) {
  const control = select(
    [["", usual(node) || "default"], ...choices.map((value) => [String(value), String(value)])],
    "",
  );
  return {
    control,
    read: () => choices.find((value) => String(value) === control.value),
    write: (value) => (control.value = value === undefined || value === null ? "" : String(value)),
  };
}

function yesNo(node) {
  const control = select(
    [
      ["", `default: ${node.default ? "yes" : "no"}`],
      ["true", "yes"],
      ["false", "no"],
    ],
    "",
  );
  return {
    control,
    read: () => (control.value ? control.value === "true" : undefined),
    write: (value) => (control.value = value === undefined || value === null ? "" : String(value)),
  };
}

/** A number; sizes and times may be written with their units. */
function number(node, name) {
  const [parse, example] = name.endsWith("_bytes")
    ? [parseBytes, "2GiB"]
    : name.endsWith("_s")
      ? [parseSeconds, "8ms"]
      : [parseNumber, "1"];
  const control = h("input", {
    type: "text",
    inputmode: parse === parseNumber ? "decimal" : "text",
    autocomplete: "off",
    placeholder: usual(node) || (parse === parseNumber ? "" : `e.g. ${example}`),
  });
  const read = () => {
    if (!control.value.trim()) return undefined;
    const value = parse(control.value.replace("−", "-"));
    if (value === null) throw new Error(`Write it like ${example}.`);
    if (node.type === "integer" && !Number.isInteger(value)) throw new Error("A whole number is wanted.");
    return value;
  };
  return { control, read, write: (value) => (control.value = value ?? "") };
}

function text(node, options, required) {
  const control = h("input", {
    type: "text",
    autocomplete: "off",
    spellcheck: "false",
    required,
    placeholder: usual(node) || (node.examples ? `e.g. ${node.examples[0]}` : ""),
  });
  return {
    control: listed(control, options),
    read: () => control.value.trim() || undefined,
    write: (value) => (control.value = value ?? ""),
  };
}

function list(node, items, options) {
  const numeric = items.type === "number" || items.type === "integer";
  const control = h("input", {
    type: "text",
    autocomplete: "off",
    spellcheck: "false",
    placeholder: usual(node) || (numeric ? "e.g. 3.5, 4.25" : "with commas"),
  });
  const read = () => {
    const parts = control.value
      .split(",")
      .map((part) => part.trim())
      .filter(Boolean);
    if (!numeric) return parts.length ? parts : undefined;
    const numbers = parts.map((part) => (items.type === "integer" ? parseBytes(part) : parseNumber(part)));
    if (numbers.includes(null)) throw new Error("Write numbers with commas between them.");
    return numbers.length ? numbers : undefined;
  };
  return {
    control: listed(control, options),
    read,
    write: (value) => (control.value = Array.isArray(value) ? value.join(", ") : (value ?? "")),
  };
}

/** What no simpler field can hold. */
function json(node) {
  const control = h("textarea", { rows: 2, spellcheck: "false", placeholder: usual(node) || "JSON" });
  const read = () => {
    if (!control.value.trim()) return undefined;
    try {
      return JSON.parse(control.value);
    } catch {
      throw new Error("This is not JSON yet.");
    }
  };
  return {
    control,
    read,
    write: (value) => (control.value = value === undefined || value === null ? "" : JSON.stringify(value)),
    wide: true,
  };
}

/** An input that suggests names, but takes others. */
function listed(control, options) {
  if (!options?.length) return control;
  const id = newId("list");
  document.body.append(
    h(
      "datalist",
      { id },
      options.map((value) => h("option", { value })),
    ),
  );
  control.setAttribute("list", id);
  return control;
}
