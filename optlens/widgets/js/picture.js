// Pictures to keep: what a view shows, drawn anew at twice its size with its labels.

import { h } from "./dom.js";
import { ticksFor } from "./headmap.js";
import { short } from "./words.js";

export const MONO = "ui-monospace, 'DejaVu Sans Mono', monospace";
const SANS = "system-ui, 'DejaVu Sans', sans-serif";
const MOST_COLUMNS = 160;

/** Return a canvas of a size with a title, and its pen, which draws at twice the size. */
export function sheet(width, height, theme, title) {
  const canvas = h("canvas", { width: 2 * width, height: 2 * height });
  const pen = canvas.getContext("2d");
  pen.scale(2, 2);
  pen.fillStyle = theme.paper;
  pen.fillRect(0, 0, width, height);
  pen.fillStyle = theme.ink;
  pen.font = `600 15px ${SANS}`;
  pen.fillText(title, 16, 26);
  return [canvas, pen];
}

/** Return a pattern with its tokens. */
export function mapPicture({ title, canvas, theme, rows, columns }) {
  const side = 520;
  const tall = (side * rows.length) / columns.length;
  const [left, top] = [120, 44];
  const [made, pen] = sheet(left + side + 20, top + tall + 120, theme, title);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(canvas, left, top, side, tall);
  pen.strokeStyle = theme.rule;
  pen.strokeRect(left, top, side, tall);
  pen.fillStyle = theme.muted;
  pen.font = `11px ${MONO}`;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (const i of ticksFor(rows.length, tall, null)) {
    pen.fillText(short(rows[i]), left - 6, top + ((i + 0.5) * tall) / rows.length);
  }
  for (const i of ticksFor(columns.length, side, null)) {
    pen.save();
    pen.translate(left + ((i + 0.5) * side) / columns.length, top + tall + 6);
    pen.rotate(-Math.PI / 2);
    pen.fillText(short(columns[i]), 0, 0);
    pen.restore();
  }
  return made;
}

/** Return a table of cells, each with a ground, an ink and a text. */
export function cellPicture({ title, theme, rows, columns, cell, width }) {
  const count = Math.min(columns.length, MOST_COLUMNS);
  const [left, top, tall] = [64, 66, 24];
  const note = count < columns.length ? ` (first ${count} of ${columns.length} positions)` : "";
  const [made, pen] = sheet(left + count * width + 20, top + rows.length * tall + 16, theme, title + note);
  pen.textBaseline = "middle";
  pen.font = `11px ${MONO}`;
  const most = Math.floor(width / 7);
  rows.forEach((name, row) => {
    const y = top + row * tall;
    pen.textAlign = "right";
    pen.fillStyle = theme.muted;
    pen.fillText(name, left - 8, y + tall / 2);
    pen.textAlign = "center";
    for (let column = 0; column < count; column += 1) {
      const { ground, ink, text } = cell(row, column);
      pen.fillStyle = ground;
      pen.fillRect(left + column * width, y, width - 1, tall - 1);
      pen.fillStyle = ink;
      pen.fillText(short(text, most), left + (column + 0.5) * width, y + tall / 2);
    }
  });
  pen.fillStyle = theme.ink;
  for (let column = 0; column < count; column += 1) {
    pen.fillText(short(columns[column], most), left + (column + 0.5) * width, top - 12);
  }
  return made;
}

/** Return terms as bars, each beginning where the one above it ended, and their sum below. */
export function stepPicture({ title, theme, steps, total }) {
  const [left, top, tall, wide] = [150, 50, 22, 460];
  const [made, pen] = sheet(left + wide + 90, top + (steps.length + 1) * tall + 20, theme, title);
  const ends = steps.flatMap(({ start, end }) => [start, end]);
  const [low, high] = [Math.min(0, total, ...ends), Math.max(0, total, ...ends)];
  const x = (value) => left + (wide * (value - low)) / (high - low || 1);
  const rows = [...steps, { name: "sum", value: total, start: 0, end: total, whole: true }];
  pen.textBaseline = "middle";
  pen.font = `12px ${SANS}`;
  rows.forEach(({ name, value, start, end, whole }, row) => {
    const y = top + (row + 0.5) * tall;
    pen.fillStyle = whole ? theme.muted : value < 0 ? theme.diverging[1] : theme.diverging.at(-2);
    pen.fillRect(Math.min(x(start), x(end)), y - 7, Math.max(1, Math.abs(x(end) - x(start))), 14);
    pen.fillStyle = theme.ink;
    pen.textAlign = "right";
    pen.fillText(short(name, 20), left - 12, y);
    pen.fillText(`${value < 0 ? "−" : whole ? "" : "+"}${Math.abs(value).toFixed(2)}`, left + wide + 76, y);
    if (whole) return;
    pen.fillStyle = theme.muted;
    pen.fillRect(x(end) - 0.5, y - 7, 1, tall + 14 - 2);
  });
  pen.fillStyle = theme.rule;
  pen.fillRect(x(0), top, 1, rows.length * tall);
  return made;
}
