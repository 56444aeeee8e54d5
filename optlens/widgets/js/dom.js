// Build elements. Text is only ever set as text: what a prompt holds cannot become markup.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Return an element.
 * @param {string} tag name, with classes after dots: "div.ol-pane.ol-across"; "svg:path" for SVG
 * @param {Record<string, any>} attributes attributes; `onclick` and its like are listeners, `style` an
 *   object of CSS properties, null and false leave an attribute out, true writes the bare name
 * @param {...any} children elements, text, lists of both, null
 */
export function h(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const svg = name.startsWith("svg:");
  const el = svg
    ? document.createElementNS(SVG, name.slice(4))
    : document.createElement(name);
  if (classes.length) el.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) el.addEventListener(key.slice(2), value);
    else if (key === "style") setStyle(el, value);
    else if (value === true) el.setAttribute(key, "");
    else if (value !== null && value !== undefined && value !== false) el.setAttribute(key, String(value));
  }
  el.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return el;
}

/** Set CSS properties one by one, which a page's policy allows where it forbids style attributes. */
export function setStyle(el, properties) {
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("--")) el.style.setProperty(key, value);
    else el.style[key] = value;
  }
}

/** Draw the inside of an element anew; what had the focus by its place among the buttons has it after. */
export function keepingFocus(el, draw) {
  const at = [...el.querySelectorAll("button")].indexOf(document.activeElement);
  draw();
  if (at >= 0) [...el.querySelectorAll("button:not(:disabled)")].slice(0, at + 1).at(-1)?.focus({ preventScroll: true });
}

/**
 * Remember what has the focus inside an element.
 * @returns {(el: HTMLElement) => void} gives it to what stands in the same place of another element:
 *   to the selected one of a table, or by its place in the tree
 */
export function focusIn(el) {
  const active = document.activeElement;
  if (!el.contains(active) || active === el) return () => null;
  const selected = active.getAttribute("aria-selected") === "true" && `.${active.classList[0]}[aria-selected=true]`;
  const path = [];
  for (let at = active; at !== el; at = at.parentElement) path.unshift([...at.parentElement.children].indexOf(at));
  return (other) => {
    const found = (selected && other.querySelector(selected)) || path.reduce((at, i) => at?.children[i], other);
    found?.focus({ preventScroll: true });
  };
}

/**
 * Call `run` whenever an element comes into sight. Notebooks take cells out of the document while they
 * are far away, and what was measured or scrolled there meanwhile was not.
 */
export function whenSeen(el, run, signal) {
  const observer = new IntersectionObserver((entries) => {
    if (entries.at(-1).isIntersecting) run();
  });
  observer.observe(el);
  signal.addEventListener("abort", () => observer.disconnect());
}

/** Offer a blob as a file. */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
