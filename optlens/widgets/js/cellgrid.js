// A table of layers and positions: a name beside each row, a token above each column, one tab stop
// with arrow keys inside. Only the columns in sight are in the document, so length costs nothing.

import { h, whenSeen } from "./dom.js";
import { handled, moved } from "./keys.js";
import { promptToken } from "./tokens.js";

const MARGIN = 6; // columns kept ready on each side

/**
 * @param {object} given
 * @param {string} given.label name of the table for screen readers
 * @param {string[]} given.rows row names
 * @param {object} given.prompt the prompt
 * @param {number[]} given.positions which of its positions are columns
 * @param {number} given.width width of a column in pixels
 * @param {(row: number, column: number) => object} given.cell what a cell shows: `children`, `ground`,
 *   `ink`, `label` for screen readers, `mark` for a class
 * @param {(row: number, column: number) => void} given.choose called when a cell is chosen
 * @param {(place: number[] | null, el?: HTMLElement) => void} given.point called as the mouse moves
 * @param {string} [given.corner] what the rows are
 * @param {(column: number) => any[]} [given.heading] what stands above a column; its token, unless given
 */
export function cellGrid({ label, rows, prompt, positions, width, cell, choose, point, signal, corner = "after layer", heading = null }) {
  const headingOf = heading ?? ((column) => [promptToken(prompt, positions[column], 10), h("small", {}, String(positions[column]))]);
  const shape = [rows.length, positions.length];
  const plane = h("div.ol-plane", {
    role: "grid", "aria-label": label, "aria-rowcount": shape[0] + 1, "aria-colcount": shape[1] + 1,
    style: { "--ol-columns": String(shape[1]), "--ol-cell": `${width}px` },
  });
  const scroll = h("div.ol-scroll.ol-cells", {}, plane);
  const head = line(null, corner);
  const lines = rows.map((name, row) => line(row, name));
  let [from, to] = [0, 0];
  let selected = [shape[0] - 1, shape[1] - 1];
  let [seen, offset, names] = [800, 0, 58]; // width and place of the part in sight, as last known

  function line(row, name) {
    const el = h("div.ol-line", { role: "row", "aria-rowindex": row === null ? 1 : row + 2 },
      h(row === null ? "div.ol-corner" : "div.ol-row-name",
        { role: row === null ? "columnheader" : "rowheader", "aria-colindex": 1 }, name));
    plane.append(el);
    return el;
  }

  const fillHead = () => {
    const cells = [];
    for (let column = from; column < to; column += 1) {
      cells.push(h("div.ol-column-name", {
        role: "columnheader", "aria-colindex": column + 2, style: { "--ol-at": String(column) },
        "data-selected": column === selected[1],
      }, headingOf(column)));
    }
    head.replaceChildren(head.firstChild, ...cells);
  };

  const fill = () => {
    fillHead();
    lines.forEach((el, row) => {
      const cells = [];
      for (let column = from; column < to; column += 1) cells.push(makeCell(row, column));
      el.replaceChildren(el.firstChild, ...cells);
      el.firstChild.toggleAttribute("data-selected", row === selected[0]);
    });
  };

  const makeCell = (row, column) => {
    const { children, ground, ink, label: words, mark } = cell(row, column);
    const here = row === selected[0] && column === selected[1];
    return h(`div.ol-cell${mark ? `.${mark}` : ""}`, {
      role: "gridcell", "aria-colindex": column + 2, "aria-label": words, tabindex: here ? 0 : -1,
      "aria-selected": String(here), "data-row": row, "data-column": column,
      style: { "--ol-at": String(column), background: ground, color: ink },
    }, children);
  };

  const find = (row, column) => lines[row].children[column - from + 1];
  const placeOf = (el) => {
    const found = el.closest?.(".ol-cell");
    return found && [Number(found.dataset.row), Number(found.dataset.column)];
  };

  /** Put the columns in sight into the document; again only when others come into sight. */
  const look = (force = false) => {
    const first = Math.floor(offset / width) - MARGIN;
    const count = Math.ceil(seen / width) + 2 * MARGIN;
    const start = Math.max(0, first);
    const end = Math.min(shape[1], first + count);
    const inside = start >= from && end <= to && to > from;
    if (inside && !force) return;
    if (!inside) {
      from = Math.max(0, start - MARGIN);
      to = Math.min(shape[1], end + MARGIN);
    }
    const focused = plane.contains(document.activeElement);
    fill();
    if (focused) (inView() ? find(...selected) : scroll).focus({ preventScroll: true });
  };
  const inView = () => selected[1] >= from && selected[1] < to;

  /** Scroll so that the selected column is in sight; the notebook around it does not move. */
  const reveal = () => {
    const left = selected[1] * width;
    const room = seen - names;
    if (left < offset) offset = left;
    else if (left + width > offset + room) offset = left + width - room;
    scroll.scrollLeft = offset;
  };

  /** Show or hide that the selected cell is selected, without making the others anew. */
  const mark = (on) => {
    lines[selected[0]].firstChild.toggleAttribute("data-selected", on);
    if (!inView() || to === from) return;
    const cell = find(...selected);
    cell.setAttribute("aria-selected", String(on));
    cell.tabIndex = on ? 0 : -1;
    head.children[selected[1] - from + 1].setAttribute("data-selected", String(on));
  };

  plane.addEventListener("click", (event) => {
    const place = placeOf(event.target);
    if (place) choose(...place);
  }, { signal });
  plane.addEventListener("keydown", (event) => {
    const place = placeOf(event.target) && moved(placeOf(event.target), event.key, shape);
    if (!place) return;
    handled(event);
    choose(...place);
    find(...selected)?.focus({ preventScroll: true });
    point(selected, find(...selected));
  }, { signal });
  plane.addEventListener("mouseover", (event) => {
    const place = placeOf(event.target);
    point(place, place && event.target.closest(".ol-cell"));
  }, { signal });
  plane.addEventListener("mouseleave", () => point(null), { signal });
  plane.addEventListener("focusout", () => point(null), { signal });
  scroll.addEventListener("scroll", () => {
    offset = scroll.scrollLeft;
    look();
  }, { signal, passive: true });
  whenSeen(scroll, () => { scroll.scrollLeft = offset; }, signal);
  const observer = new ResizeObserver(() => {
    if (!scroll.clientWidth) return;
    const first = seen !== scroll.clientWidth;
    seen = scroll.clientWidth;
    names = head.firstChild.offsetWidth;
    if (first) reveal();
    look();
  });
  observer.observe(scroll);
  signal.addEventListener("abort", () => observer.disconnect());

  return {
    el: scroll,
    refresh: () => look(true),
    /** Select a cell and make all of them anew. */
    select(row, column) {
      selected = [row, column];
      reveal();
      look(true);
    },
    /** Select a cell; the others are as they were. */
    move(row, column) {
      mark(false);
      selected = [row, column];
      reveal();
      look();
      mark(true);
    },
  };
}
