// Moving by keyboard. Pure but for `handled`.

const STEPS = {
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
  PageUp: [-10, 0],
  PageDown: [10, 0],
};

/**
 * Return where a key leads in a table, or null if it leads nowhere in tables.
 * @param {number[]} place row and column
 * @param {string} key name of the key
 * @param {number[]} shape rows and columns
 */
export function moved([row, column], key, [rows, columns]) {
  if (key === "Home") return [row, 0];
  if (key === "End") return [row, columns - 1];
  const step = STEPS[key];
  if (!step) return null;
  const within = (place, size) => Math.min(Math.max(place, 0), size - 1);
  return [within(row + step[0], rows), within(column + step[1], columns)];
}

/** Return where a key leads in a list that wraps into lines of `columns`, or null. */
export function movedInList(place, key, count, columns) {
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
  if (key === "Home") return 0;
  if (key === "End") return count - 1;
  if (!step) return null;
  const next = place + step;
  return next >= 0 && next < count ? next : place;
}

/** A handled key goes no further: notebooks have meanings of their own for letters and arrows. */
export function handled(event) {
  event.preventDefault();
  event.stopPropagation();
}

/** Whether a key press is a letter for the view, not one typed into a field or with a modifier. */
export function isCommand(event) {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  return !typing && !event.ctrlKey && !event.metaKey && !event.altKey;
}
