// Light and dark, and the colours that figures take from the style sheet.

const KEY = "bitfront-theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const changes = new EventTarget();

/** Call when the colours change; until the signal aborts. */
export const onTheme = (listener, signal) => changes.addEventListener("theme", listener, { signal });

/** The switch in the header. */
export function themeSwitch(select) {
  select.value = document.documentElement.dataset.theme || "auto";
  select.addEventListener("change", () => {
    const chosen = select.value;
    if (chosen === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    try {
      localStorage.setItem(KEY, chosen);
    } catch {
      // it holds until the page is closed
    }
    changes.dispatchEvent(new Event("theme"));
  });
  system.addEventListener("change", () => changes.dispatchEvent(new Event("theme")));
}

/** A colour of the style sheet, such as `accent`. */
export const color = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// Viridis at nine stops: even steps look even, and in grey, too.
const VIRIDIS = [
  [68, 1, 84],
  [71, 44, 122],
  [59, 81, 139],
  [44, 113, 142],
  [33, 144, 141],
  [39, 173, 129],
  [92, 200, 99],
  [170, 220, 50],
  [253, 231, 37],
];
const DIVERGING = [
  [178, 63, 12],
  [222, 128, 78],
  [244, 196, 168],
  [240, 240, 240],
  [160, 197, 240],
  [74, 140, 218],
  [11, 83, 170],
];

/** The scales' colours at 0..1: background, and an ink that can be read on it. */
export const viridis = (share) => inked(VIRIDIS, share);
export const diverging = (share) => inked(DIVERGING, share);

function inked(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const rgb = stops[low].map((value, i) => Math.round(value + (place - low) * (stops[low + 1][i] - value)));
  const light = luminance(rgb);
  // whichever of black and white has the higher contrast (WCAG's formula)
  const ink = (light + 0.05) / 0.05 > 1.05 / (light + 0.05) ? "#000" : "#fff";
  return { background: `rgb(${rgb.join(" ")})`, ink };
}

function luminance(rgb) {
  const [r, g, b] = rgb.map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
