// Where a job's time went.

import { h, panel, put } from "./dom.js";
import { duration, percent } from "./format.js";
import { bars } from "./sensitivity.js";

/** The panel: a bar a stage, in the order in which they ran. */
export function timingPanel(state) {
  const body = h("div", {});
  const section = panel("Where time went", { wide: false, id: "time" }, body);
  state.on(["detail"], () => {
    const stages = state.detail?.seconds || [];
    const all = stages.reduce((sum, stage) => sum + stage.seconds, 0);
    const most = Math.max(...stages.map((stage) => stage.seconds), 1e-9);
    put(
      body,
      stages.length
        ? [
            bars(
              stages.map((stage) => [
                stage.stage,
                stage.seconds / most,
                `${duration(stage.seconds)}, ${percent(stage.seconds / all)}`,
              ]),
            ),
            h("p", { class: "muted" }, `${duration(all)} in all.`),
          ]
        : h("p", { class: "muted" }, "No stage has ended yet."),
    );
  });
  return section;
}
