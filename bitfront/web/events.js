// A job's event stream. Read with fetch, because EventSource can't send the Authorization header.

import { fetchApi, wait } from "./api.js";

const SLOWEST_S = 15;

/** Follow a job's events until the signal aborts or `handle(kind, data)` returns false. A stream
 *  that breaks is taken up again after the last event that arrived, and `handle("broken")` hears of
 *  it: the job may have ended in between. `last` is the number of an event to begin behind. */
export async function follow(job, handle, signal, last = null) {
  let pause = 1;
  while (!signal.aborted) {
    const headers = { Accept: "text/event-stream", ...(last === null ? {} : { "Last-Event-ID": last }) };
    try {
      const response = await fetchApi(`/jobs/${job}/events`, { headers, signal });
      for await (const event of parsed(response.body, signal)) {
        if (event.id) last = event.id;
        pause = 1;
        if (handle(event.kind, event.data) === false) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status >= 400) throw error; // the server refuses: asking again won't help
    }
    await wait(pause, signal).catch(() => {});
    if (!signal.aborted && handle("broken") === false) return;
    pause = Math.min(2 * pause, SLOWEST_S);
  }
}

/** The events of a body: {id, kind, data}, by the rules of text/event-stream. */
async function* parsed(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  signal.addEventListener("abort", () => reader.cancel().catch(() => {}), { once: true });
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = one(block);
      if (event) yield event;
    }
  }
}

function one(block) {
  const found = { id: null, kind: "message", data: [] };
  for (const line of block.split("\n")) {
    const [, name, value] = /^([a-z]+): ?(.*)$/.exec(line) || [];
    if (name === "data") found.data.push(value);
    else if (name === "event") found.kind = value;
    else if (name === "id") found.id = value;
  }
  // comments keep the line open and say nothing
  return found.data.length ? { ...found, data: JSON.parse(found.data.join("\n")) } : null;
}
