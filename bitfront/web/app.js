// The frame: which page an address shows, the banner, and who is asking.

import { get, onAway } from "./api.js";
import { forget, token } from "./auth.js";
import { failure, h, put } from "./dom.js";
import { themeSwitch } from "./theme.js";

const main = document.getElementById("main");
let current = new AbortController();

const ROUTES = [
  [/^#\/jobs\/(\d+)$/, "./job.js", "Job"],
  [/^#\/jobs$/, "./jobs.js", "Jobs"],
  [/^#\/submit$/, "./submit.js", "New job"],
  [/^#\/query$/, "./query.js", "Query"],
  [/^#\/compare$/, "./compare.js", "Compare"],
];

/** Show the page of the address; the page before hears through its signal that it is over. */
async function route() {
  current.abort(new DOMException("another page", "AbortError"));
  current = new AbortController();
  const { signal } = current;
  const [path, search] = (location.hash || "#/jobs").split("?");
  const [pattern, module, title] = ROUTES.find(([route]) => route.test(path)) || ROUTES[1];
  document.title = `${title} – Bitfront`;
  markNav(path);
  put(main, h("p", { class: "muted" }, "Loading …"));
  try {
    const { page } = await import(module);
    const shown = h("div", { class: "page" });
    await page(shown, { id: pattern.exec(path)?.[1], search: new URLSearchParams(search) }, signal);
    if (signal.aborted) return;
    put(main, shown);
    shown.dispatchEvent(new Event("shown")); // figures measure their box once it has one
  } catch (error) {
    if (!signal.aborted) put(main, h("h1", {}, title), failure(error));
  }
}

function markNav(path) {
  for (const link of document.querySelectorAll(".top nav a")) {
    const here = path === link.hash || (link.hash === "#/jobs" && path.startsWith("#/jobs/"));
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function banner(text) {
  const box = document.getElementById("banner");
  box.hidden = !text;
  if (box.textContent !== (text || "")) box.textContent = text || "";
}

async function who() {
  const box = document.getElementById("who");
  const found = await get("/whoami").catch(() => null);
  if (!found) return;
  const out = h("button", { class: "plain", onclick: () => (forget(), location.reload()) }, "Forget token");
  put(
    box,
    found.authenticated ? `${found.name} (${found.role})` : `v${found.version}`,
    token() ? [" ", out] : null,
  );
}

onAway(banner);
themeSwitch(document.getElementById("theme"));
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // its address would be taken for a page
  main.focus();
});
addEventListener("hashchange", () =>
  route()
    .then(() => main.focus({ preventScroll: true }))
    .then(() => scrollTo(0, 0)),
);
who();
route();
