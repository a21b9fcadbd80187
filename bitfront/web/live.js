// A job that runs: its events change what the page knows, until it ends.

import { get, wait } from "./api.js";
import { follow } from "./events.js";

const DRIVER_S = 20;
export const ENDED = ["done", "failed", "cancelled"];

/** Follow a job. `load` reads its front again, `fail` is told if the server refuses. */
export function live(state, log, load, fail) {
  if (state.following) return;
  state.following = true;
  const again = oneAtATime(load);
  const renew = async () => {
    state.set({ job: await get(`/jobs/${state.job.id}`, state.signal) });
    return again();
  };
  const update = (values) => state.set({ job: { ...state.job, ...values } });
  const handle = (kind, data) => {
    if (kind === "progress") update({ progress: data, alive: true }); // only a driver that lives reports
    if (kind === "log") log.add(data);
    if (kind === "stage") log.stage(data);
    if (kind === "point") {
      update({ points: data.points });
      again();
    }
    if (kind === "state") {
      // not all of data: an event has an id of its own
      update({ state: data.state, error: data.error ?? null, alive: data.state === "running" });
      if (data.state === "running") log.open = true;
    }
    if (kind === "state" || kind === "broken") renew().catch(() => {}); // the next one may work
    return !ENDED.includes(state.job.state);
  };
  Promise.resolve(state.heard)
    .then((last) => follow(state.job.id, handle, state.signal, last))
    .catch((error) => state.signal.aborted || fail(error))
    .finally(() => (state.following = false));
  watchDriver(state, renew);
}

/** Calls while one is under way become one more after it. */
function oneAtATime(work) {
  let [busy, more] = [false, false];
  return async () => {
    more = true;
    if (busy) return;
    busy = true;
    try {
      while (more) {
        more = false;
        await work();
      }
    } finally {
      busy = false;
    }
  };
}

/** No event tells of a driver that died: ask now and then. */
async function watchDriver(state, renew) {
  try {
    for (await wait(DRIVER_S, state.signal); state.following; await wait(DRIVER_S, state.signal)) {
      await renew();
    }
  } catch {
    // another page is shown
  }
}
