// The HTTP API: requests, problems in plain words, patience while the server is away, downloads.

import { askForToken, forget, token } from "./auth.js";

const PREFIX = "/api/v1";
const SLOWEST_S = 30;

/** What the server refused, as its problem document says it. */
export class Problem extends Error {
  constructor(status, document) {
    super(document.detail || document.title || `the server answered ${status}`);
    this.status = status;
    this.detail = this.message;
    this.errors = document.errors || [];
  }
}

const away = new EventTarget();
/** Call with a sentence when the server is away, with null when it is back. */
export const onAway = (listener) => away.addEventListener("away", (event) => listener(event.detail));
const tell = (text) => away.dispatchEvent(new CustomEvent("away", { detail: text }));

/** Seconds of waiting that end early when the signal says so. */
export function wait(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

/** An API request; resolves to the response, raises `Problem`. Reads wait for a server that is away. */
export async function fetchApi(path, { method = "GET", body, signal, headers = {} } = {}) {
  for (let tries = 0; ; tries += 1) {
    const used = token();
    const sent = { ...headers, ...(used ? { Authorization: `Bearer ${used}` } : {}) };
    if (body !== undefined) sent["Content-Type"] = "application/json";
    let response = null;
    try {
      response = await fetch(PREFIX + path, {
        method,
        signal,
        headers: sent,
        body: body === undefined ? undefined : JSON.stringify(body),
      });
    } catch (error) {
      if (signal?.aborted || method !== "GET") throw signal?.aborted ? error : unreachable();
    }
    if (response && response.status !== 401 && response.status !== 503) {
      tell(null);
      if (response.ok) return response;
      throw await problemOf(response);
    }
    await recover(response, method, used, tries, signal);
  }
}

/** After a 401 a token, after a 503 or a broken line some time; what writes isn't sent twice. */
async function recover(response, method, used, tries, signal) {
  if (response?.status === 401) {
    const { detail } = await problemOf(response);
    if (token() === used) forget(); // not if another request was given a new one meanwhile
    if (!token()) await askForToken(detail);
    return;
  }
  const problem = response ? await problemOf(response) : unreachable();
  if (method !== "GET") throw problem;
  const asked = Number(response?.headers.get("Retry-After"));
  const pause = Math.min(asked || 2 ** Math.min(tries, 5), SLOWEST_S);
  tell(`${problem.detail} Trying again every ${pause} s.`);
  await wait(pause, signal);
}

const unreachable = () => new Problem(0, { detail: "The server can't be reached." });

async function problemOf(response) {
  const document = await response.json().catch(() => ({}));
  return new Problem(response.status, document);
}

/** Read JSON. */
export const get = async (path, signal) => (await fetchApi(path, { signal })).json();

/** Send JSON, read JSON. */
export const post = async (path, body = {}, headers = {}) =>
  (await fetchApi(path, { method: "POST", body, headers })).json();

/** Query parameters; what is empty is left out. */
export function query(values) {
  const found = Object.entries(values).filter(
    ([, value]) => value !== null && value !== undefined && value !== "",
  );
  return found.length ? `?${new URLSearchParams(found)}` : "";
}

/** Save a file of the API. A link can't send the token, so its bytes are fetched: streamed to disk
 *  where the browser lets a page do that, since a model is larger than memory likes. */
export async function download(path, name) {
  if (!token()) return clickLink(PREFIX + path, name);
  if (window.showSaveFilePicker) {
    const handle = await window.showSaveFilePicker({ suggestedName: name });
    const response = await fetchApi(path);
    return response.body.pipeTo(await handle.createWritable());
  }
  const address = URL.createObjectURL(await (await fetchApi(path)).blob());
  clickLink(address, name);
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

function clickLink(href, name) {
  const link = document.createElement("a");
  link.href = href;
  link.download = name;
  link.click();
}
