// The colours in force, read from the style sheet, so that canvases follow the theme as text does.

import { levelTable } from "./colour.js";

/** @returns {object | null} the theme's colours; null while the element is in no document */
export function readTheme(root) {
  const css = getComputedStyle(root);
  const list = (name) => css.getPropertyValue(`--ol-${name}`).trim().split(/\s+/).filter(Boolean);
  const ramp = list("ramp");
  if (!ramp.length) return null;
  const one = (name) => list(name)[0];
  return {
    ramp,
    diverging: list("diverging"),
    series: list("series"),
    paper: one("paper"),
    ink: one("ink"),
    muted: one("muted"),
    rule: one("rule"),
    masked: one("masked"),
    warm: one("warm"),
    levels: levelTable(ramp, one("masked")),
  };
}

/** Call `changed` whenever the colours in force are others than before. */
export function watchTheme(root, changed, signal) {
  let last = "";
  const look = () => {
    const theme = readTheme(root);
    if (!theme || theme.paper === last) return;
    last = theme.paper;
    changed(theme);
  };
  const observer = new MutationObserver(look);
  for (const el of [document.documentElement, document.body]) {
    observer.observe(el, { attributes: true, attributeFilter: ["class", "data-jp-theme-light"] });
  }
  signal.addEventListener("abort", () => observer.disconnect());
  for (const query of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(query).addEventListener("change", look, { signal });
  }
  look();
  // A notebook calls this before the element is in the document, where no style applies yet.
  if (!last) requestAnimationFrame(look);
}
