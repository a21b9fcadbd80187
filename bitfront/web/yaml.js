// The part of YAML that job files are written in: maps, lists, both on one line, scalars, comments.
// (No anchors, no multi-line strings: who writes those is told so.)

/** An object as YAML. */
export function toYaml(value, indent = "") {
  return Object.entries(value)
    .map(([key, item]) => {
      const name = `${indent}${scalar(key)}:`;
      if (item && typeof item === "object" && !Array.isArray(item) && Object.keys(item).length) {
        return Object.values(item).some((part) => part && typeof part === "object")
          ? `${name}\n${toYaml(item, `${indent}  `)}`
          : `${name} ${flow(item)}\n`;
      }
      return `${name} ${flow(item)}\n`;
    })
    .join("");
}

function flow(value) {
  if (Array.isArray(value)) return `[${value.map(flow).join(", ")}]`;
  if (value && typeof value === "object")
    return `{${Object.entries(value)
      .map(([key, item]) => `${scalar(key)}: ${flow(item)}`)
      .join(", ")}}`;
  return scalar(value);
}

const scalar = (value) =>
  typeof value !== "string" ||
  (/^[\w./][\w./ +-]*$/.test(value) && typeof plain(value.trim()) === "string" && value === value.trim())
    ? String(value)
    : JSON.stringify(value);

/** YAML as an object; raises Error with the line's number. */
export function fromYaml(text) {
  const lines = text
    .split("\n")
    .map((raw, i) => ({ number: i + 1, text: uncommented(raw).trimEnd() }))
    .filter((line) => line.text.trim() && line.text.trim() !== "---");
  for (const line of lines) Object.assign(line, { indent: line.text.search(/\S/), text: line.text.trim() });
  const reader = { lines, next: 0 };
  const found = lines.length ? block(reader, lines[0].indent) : {};
  if (reader.next < lines.length)
    throw new Error(`line ${lines[reader.next].number}: indented unlike the lines before it`);
  return found;
}

/** A line without its comment; a # inside quotes or a word is none. */
function uncommented(line) {
  let quote = null;
  for (let i = 0; i < line.length; i += 1) {
    if (quote) quote = line[i] === quote ? null : quote;
    else if (line[i] === '"' || line[i] === "'") quote = line[i];
    else if (line[i] === "#" && (i === 0 || /\s/.test(line[i - 1]))) return line.slice(0, i);
  }
  return line;
}

function block(reader, indent) {
  const isList = /^-(\s|$)/.test(reader.lines[reader.next].text);
  const found = isList ? [] : {};
  while (reader.next < reader.lines.length && reader.lines[reader.next].indent === indent) {
    const line = reader.lines[reader.next];
    if (isList && !/^-(\s|$)/.test(line.text)) break; // a list may stand as far left as its name
    reader.next += 1;
    if (isList) found.push(value(reader, line, entry(line), indent));
    else {
      const [, key, rest] =
        /^("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^:#[\]{}]+?)\s*:(?:\s+(.*))?$/.exec(line.text) || [];
      if (key === undefined) throw new Error(`line ${line.number}: write "name: value"`);
      found[plain(key)] = value(reader, line, rest || "", indent);
    }
  }
  return found;
}

function entry(line) {
  const text = line.text.slice(1).trim();
  if (/^[\w-]+:(\s|$)/.test(text))
    throw new Error(`line ${line.number}: write maps in a list as {name: value}`);
  return text;
}

/** What stands behind a colon or a dash: on the line, or in the lines below. */
function value(reader, line, text, indent) {
  if (/^[|>&*!]/.test(text))
    throw new Error(`line ${line.number}: '${text[0]}' isn't understood here; use JSON`);
  if (text) return inline(text, line.number);
  const next = reader.lines[reader.next];
  const isList = next && next.indent === indent && /^-(\s|$)/.test(next.text) && !/^-(\s|$)/.test(line.text);
  return next && (next.indent > indent || isList) ? block(reader, next.indent) : null;
}

/** [a, b], {a: 1} and scalars. */
function inline(text, number) {
  const reader = { text, at: 0, number };
  const found = part(reader, "");
  if (reader.at < text.length) throw new Error(`line ${number}: what is '${text.slice(reader.at)}'?`);
  return found;
}

function part(reader, ends) {
  skip(reader);
  const open = reader.text[reader.at];
  if (open === "[" || open === "{") return collection(reader, open === "[" ? "]" : "}");
  const quoted = /^("(?:[^"\\]|\\.)*"|'(?:[^']|'')*')/.exec(reader.text.slice(reader.at));
  const start = reader.at;
  if (quoted) reader.at += quoted[0].length;
  else while (reader.at < reader.text.length && !ends.includes(reader.text[reader.at])) reader.at += 1;
  const found = plain(reader.text.slice(start, reader.at).trim());
  skip(reader);
  return found;
}

function collection(reader, close) {
  const found = close === "]" ? [] : {};
  reader.at += 1;
  for (skip(reader); reader.text[reader.at] !== close; skip(reader)) {
    if (reader.at >= reader.text.length)
      throw new Error(
        `line ${reader.number}: a '${close}' is missing (and everything between brackets goes on one line)`,
      );
    const first = part(reader, close === "]" ? ",]" : ":,}");
    if (close === "]") found.push(first);
    else {
      if (reader.text[reader.at] !== ":") throw new Error(`line ${reader.number}: write {name: value}`);
      reader.at += 1;
      found[first] = part(reader, ",}");
    }
    if (reader.text[reader.at] === ",") reader.at += 1;
  }
  reader.at += 1;
  skip(reader);
  return found;
}

function skip(reader) {
  while (reader.text[reader.at] === " ") reader.at += 1;
}

function plain(text) {
  if (/^".*"$/.test(text)) return JSON.parse(text);
  if (/^'.*'$/.test(text)) return text.slice(1, -1).replaceAll("''", "'");
  if (text === "" || text === "~" || text === "null") return null;
  if (text === "true" || text === "false") return text === "true";
  return /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(text) ? Number(text) : text;
}
