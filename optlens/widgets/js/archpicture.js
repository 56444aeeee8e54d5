// The architecture view's drawing as a picture to keep: the boxes and lines where they stand.

import { histogramPath } from "./archplan.js";
import { MONO, sheet } from "./picture.js";

/**
 * @param {object} given
 * @param {{ box: object, lines: string[], counts: ArrayLike<number> | null, on: boolean }[]} given.boxes
 * @param {string[]} given.paths lines between them
 * @param {object[]} given.cards what groups of boxes stand on
 */
export function archPicture({ title, theme, size, boxes, paths, cards, stem }) {
  const [left, top] = [16, 44];
  const [made, pen] = sheet(size[0] + 2 * left, size[1] + top + 16, theme, title);
  pen.translate(left, top);
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  const rounded = ({ left: x, top: y, right, bottom }, radius) => {
    pen.beginPath();
    pen.roundRect(x, y, right - x, bottom - y, radius);
  };
  for (const card of cards) {
    pen.strokeStyle = theme.rule;
    pen.lineWidth = 1;
    rounded(card, 9);
    pen.stroke();
  }
  pen.fillStyle = theme.rule;
  pen.fillRect(stem.x - 2, stem.top, 4, stem.bottom - stem.top);
  pen.strokeStyle = theme.muted;
  pen.lineWidth = 1.3;
  for (const path of paths) pen.stroke(new Path2D(path));
  for (const { box, lines, counts, on } of boxes) {
    pen.fillStyle = theme.paper;
    rounded(box, on === "sum" ? 20 : 6);
    pen.fill();
    if (counts) {
      pen.save();
      pen.translate(box.left + 3, box.bottom - 12);
      pen.scale((box.right - box.left - 6) / 100, 0.5);
      [, , pen.fillStyle] = theme.ramp;
      pen.fill(new Path2D(histogramPath(counts)));
      pen.restore();
    }
    pen.strokeStyle = on ? theme.ink : theme.muted;
    pen.lineWidth = on ? 1.6 : 1;
    rounded(box, on === "sum" ? 20 : 6);
    pen.stroke();
    lines.forEach((line, i) => {
      pen.fillStyle = i ? theme.muted : theme.ink;
      pen.font = i ? `10px ${MONO}` : "600 12px system-ui, sans-serif";
      pen.fillText(line, (box.left + box.right) / 2, on === "sum" ? (box.top + box.bottom) / 2 : box.top + 11 + 14 * i, box.right - box.left - 6);
    });
  }
  return made;
}
