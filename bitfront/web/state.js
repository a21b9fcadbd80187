// What a job's page knows and what is chosen on it. Panels draw what they show when it changes.

/** Fields: job, front, detail (null until known), a, b (points' ids), shown ("17" or "s0": whose map
 *  is drawn), limits, solutions. */
export class State extends EventTarget {
  constructor(signal) {
    super();
    Object.assign(this, {
      job: null,
      front: null,
      detail: null,
      a: null,
      b: null,
      shown: null,
      limits: {},
      solutions: [],
      signal,
    });
  }

  /** Change fields; who follows one of them draws once. */
  set(values) {
    const changed = Object.keys(values).filter((name) => this[name] !== values[name]);
    if (!changed.length) return;
    Object.assign(this, values);
    this.dispatchEvent(new CustomEvent("change", { detail: changed }));
  }

  /** Call now, and whenever one of the fields changes. */
  on(names, listener) {
    this.addEventListener(
      "change",
      (event) => event.detail.some((name) => names.includes(name)) && listener(),
      { signal: this.signal },
    );
    listener();
  }

  /** The point with that id. */
  point(id) {
    return this.front?.points.find((point) => point.id === id) || null;
  }

  /** Choose a point: its map is drawn. */
  choose(id) {
    this.set({ a: id, shown: String(id) });
  }

  /** What `shown` names: {columns (a scheme's index a unit), title, solution?}, or null. */
  get map() {
    if (this.shown === null || !this.detail) return null;
    if (this.shown.startsWith("s")) {
      const solution = this.solutions[Number(this.shown.slice(1))];
      return solution ? { columns: solution.map, solution } : null;
    }
    const columns = this.detail.maps[this.shown];
    return columns ? { columns, point: this.point(Number(this.shown)) } : null;
  }
}
