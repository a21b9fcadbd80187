// What a point can be judged by: names, units, how limits are typed, and which are limits at all.

import {
  bits, bytes, digits, joules, kl, parseBytes, parseJoules, parseNumber, parseSeconds, seconds,
} from "./format.js";

const size = (values) => (Math.max(...values) >= 2e9 ? [1e9, "GB"] : [1e6, "MB"]);
const time = (values) => (Math.max(...values) >= 1 ? [1, "s"] : [1e-3, "ms"]);
const energy = (values) => (Math.max(...values) >= 1 ? [1, "J"] : [1e-3, "mJ"]);
const plain = () => [1, ""];

/** By the API's name. `of` reads a point, `scale` gives an axis's unit, `limit` names the limit. */
export const QUANTITIES = {
  weight_bytes: {
    name: "weight bytes",
    title: "model weights",
    of: (p) => p.size_bytes ?? p.weight_bytes + (p.cache_bytes ?? 0), // what budgets count
    show: bytes,
    parse: parseBytes,
    scale: size,
    limit: "Max size",
    example: "120MB",
  },
  average_bits: {
    name: "average bits",
    title: "average bits of the weights decided",
    of: (p) => p.average_bits,
    show: bits,
    parse: parseNumber,
    scale: plain,
    limit: "Max bits",
    example: "4.25",
  },
  memory_bytes: {
    name: "memory",
    title: "memory at the workload",
    of: (p) => p.memory_bytes,
    show: bytes,
    parse: parseBytes,
    scale: size,
    limit: "Max memory",
    example: "2GiB",
  },
  decode_s: {
    name: "decode latency",
    title: "seconds of a generated token",
    of: (p) => p.decode_s,
    show: seconds,
    parse: parseSeconds,
    scale: time,
    limit: "Max decode latency",
    example: "8ms",
  },
  prefill_s: {
    name: "prefill latency",
    title: "seconds of a prompt",
    of: (p) => p.prefill_s,
    show: seconds,
    parse: parseSeconds,
    scale: time,
    limit: "Max prefill latency",
    example: "500ms",
  },
  kl: {
    name: "KL",
    title: "KL from the unquantized model, nats per token",
    of: (p) => p.kl,
    show: kl,
    parse: parseNumber,
    scale: plain,
    limit: "Max KL",
    example: "0.05",
    log: true,
  },
  perplexity: {
    name: "perplexity",
    title: "perplexity of held-out text",
    of: (p) => p.perplexity,
    show: (v) => digits(v, 4),
    scale: plain,
    log: true,
  },
  decode_j: {
    name: "decode energy",
    title: "joules of a generated token",
    of: (p) => p.decode_j,
    show: joules,
    parse: parseJoules,
    scale: energy,
    limit: "Max decode energy",
    example: "40mJ",
  },
  prefill_j: {
    name: "prefill energy",
    title: "joules of a prompt",
    of: (p) => p.prefill_j,
    show: joules,
    parse: parseJoules,
    scale: energy,
    limit: "Max prefill energy",
    example: "20J",
  },
};

/** The names that at least one point has a value for. */
export const known = (points) => Object.keys(QUANTITIES).filter((name) => points.some((p) => has(name, p)));

/** Whether a point has a value. */
export function has(name, point) {
  const value = QUANTITIES[name].of(point);
  return value !== null && value !== undefined && Number.isFinite(value);
}

/** Whether what `of` gives is a prediction, which stands in for seconds that nobody measured. */
export const isPredicted = (name, point) => name.endsWith("_s") && point.times === "predicted";

/** The points that nothing beats in both quantities: by rising x, each the lowest so far. */
export function frontOf(points, x, y) {
  const of = (name, p) => QUANTITIES[name].of(p);
  const sorted = points
    .filter((p) => has(x, p) && has(y, p))
    .sort((p, q) => of(x, p) - of(x, q) || of(y, p) - of(y, q));
  let lowest = Infinity;
  return sorted.filter((p) => of(y, p) < lowest && ((lowest = of(y, p)), true));
}

/** The best point within limits (`{kl: 0.1, …}`), as the API's query chooses: the least KL, then the
 *  fewest bytes; with a limit on the KL the fewest bytes, then the least KL. Or why there is none. */
export function best(points, limits) {
  const asked = Object.entries(limits).filter(([, limit]) => limit !== null && limit !== undefined);
  const fits = (p) => asked.every(([name, limit]) => has(name, p) && QUANTITIES[name].of(p) <= limit);
  const order =
    limits.kl !== null && limits.kl !== undefined ? ["weight_bytes", "kl"] : ["kl", "weight_bytes"];
  const by = (name) => (p, q) => QUANTITIES[name].of(p) - QUANTITIES[name].of(q);
  const [first, second] = order.map(by);
  const found = points.filter(fits).sort((p, q) => first(p, q) || second(p, q));
  return found.length ? { point: found[0] } : { why: whyNone(points, asked) };
}

function whyNone(points, asked) {
  if (!points.length) return "No point is measured yet.";
  for (const [name, limit] of asked) {
    const { of, show } = QUANTITIES[name];
    const least = Math.min(...points.filter((p) => has(name, p)).map(of));
    if (!Number.isFinite(least)) return `No point's ${QUANTITIES[name].name} is known.`;
    if (least > limit)
      return `No measured point has ${QUANTITIES[name].name} of at most ${show(limit)}; the least is ${show(least)}.`;
  }
  return "No measured point meets these limits together; relax one of them.";
}
