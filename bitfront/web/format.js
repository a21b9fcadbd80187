// Numbers as people read them, and back: the rules of bitfront/sizes.py.

const UNITS = {
  "": 1,
  b: 1,
  kb: 1e3,
  mb: 1e6,
  gb: 1e9,
  tb: 1e12,
  kib: 2 ** 10,
  mib: 2 ** 20,
  gib: 2 ** 30,
  tib: 2 ** 40,
};
const TIMES = { "": 1, s: 1, ms: 1e-3, us: 1e-6 };
const ENERGIES = { "": 1, j: 1, mj: 1e-3, kj: 1e3, MJ: 1e6 };

/** Digits that count, without an exponent where none is needed. */
export function digits(value, count = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e7) return value.toExponential(Math.max(count - 2, 1)).replace("-", "−");
  return String(Number(value.toPrecision(count))).replace("-", "−");
}

/** `102.4 MB`. */
export function bytes(value) {
  if (value === null || value === undefined) return "–";
  let rest = value;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (rest < 1000) return `${digits(rest)} ${unit}`;
    rest /= 1000;
  }
  return `${digits(rest)} TB`;
}

/** `8.25 ms`. */
export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1) return `${digits(value)} s`;
  if (value >= 1e-3) return `${digits(value * 1e3)} ms`;
  return `${digits(value * 1e6)} µs`;
}

/** Time that passes: `4 min 5 s`, `2 h 3 min`. */
export function duration(value) {
  if (value === null || value === undefined) return "–";
  if (value < 9.95) return `${digits(value, 2)} s`;
  const whole = Math.round(value);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

/** How long ago an ISO time was. */
export function age(iso) {
  const past = Math.max((Date.now() - Date.parse(iso)) / 1000, 0);
  if (past < 60) return "just now";
  if (past < 3600) return `${Math.floor(past / 60)} min ago`;
  if (past < 86400) return `${Math.floor(past / 3600)} h ago`;
  return `${Math.floor(past / 86400)} d ago`;
}

export const fixed = (value, count) =>
  value === null || value === undefined ? "–" : value.toFixed(count).replace("-", "−");
export const bits = (value) => fixed(value, 3);
export const kl = (value) => digits(value, 3);
export const percent = (value) => `${Math.round(100 * value)} %`;
export const signed = (value, count = 3) => (value > 0 ? "+" : "") + digits(value, count);

/** A clause of the API's as a sentence: a capital and a full stop. */
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/([^.!?])$/, "$1.");

/** `60 × int4-g64, 2 × bf16`, the most frequent first. */
export function counts(schemes) {
  return Object.entries(schemes || {})
    .sort((a, b) => b[1] - a[1])
    .map(([name, n]) => `${n} × ${name}`)
    .join(", ");
}

/** Bytes of `120MB` or `1.5GiB`; null where it is no size. */
export function parseBytes(text) {
  const value = parse(text, UNITS);
  return value === null ? null : Math.floor(value + 1e-6); // 0.29 GB is 290000000.00000006
}

/** Seconds of `8ms`; null where it is no time. */
export const parseSeconds = (text) => parse(text.replace("µ", "u"), TIMES);

/** Joules of `40mJ`; null where it is no energy. */
export const parseJoules = (text) => parse(text, ENERGIES);

/** `41.3 mJ`. */
export const joules = (value) =>
  value < 1 ? `${digits(1e3 * value, 3)} mJ` : `${digits(value, 3)} J`;

/** A plain number, or null. */
export const parseNumber = (text) => parse(text, { "": 1 });

function parse(text, units) {
  const match = /^\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*$/i.exec(text);
  const unit = match && (units[match[2]] ?? units[match[2].toLowerCase()]);
  return unit === undefined || unit === null ? null : Number(match[1]) * unit;
}
