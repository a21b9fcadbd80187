// The token: asked for where the API wants one, kept in this tab (or, if wished, in this browser).

import { field, h, prose, put, tick } from "./dom.js";

const KEY = "bitfront-token";
let asking = null;
let memory = null; // where storage is forbidden

/** The token, or null. It travels in a header only: never in an address, where logs would keep it. */
export function token() {
  try {
    return sessionStorage.getItem(KEY) || localStorage.getItem(KEY) || memory;
  } catch {
    return memory;
  }
}

function keep(value, remember) {
  memory = value;
  try {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
    if (value) (remember ? localStorage : sessionStorage).setItem(KEY, value);
  } catch {
    // this page keeps it until it is closed
  }
}

/** Forget it. */
export const forget = () => keep(null, false);

/** Ask for a token; many requests that fail at once ask one question. Resolves when one is given. */
export function askForToken(detail) {
  asking ||= new Promise((resolve) => open(detail, resolve)).finally(() => (asking = null));
  return asking;
}

function open(detail, resolve) {
  const dialog = document.getElementById("token");
  const input = h("input", { type: "password", autocomplete: "off", spellcheck: "false", required: true });
  const remember = tick("Remember it in this browser", false);
  const form = h(
    "form",
    {
      method: "dialog",
      class: "stack",
      onsubmit: () => {
        keep(input.value.trim(), remember.input.checked);
        resolve();
      },
    },
    field("Token", input),
    remember,
    h("p", { class: "hint" }, "Kept until this tab is closed, unless you want it remembered."),
    h("button", { class: "primary" }, "Use it"),
  );
  put(dialog, h("h2", { id: "token-title" }, "This server wants a token"), h("p", {}, prose(detail)), form);
  dialog.addEventListener("cancel", (event) => event.preventDefault()); // nothing works without one
  if (!dialog.open) dialog.showModal();
  input.focus();
}
