// A neuron's examples and bars as a picture to keep.

import { cssOf, inkOn, mixed } from "./colour.js";
import { MONO, sheet } from "./picture.js";
import { short } from "./words.js";

const [WIDE, LINE, LETTER, LEFT] = [820, 24, 7.3, 72];

/** @returns {{ column: number, text: string, x: number, wide: number }[][]} tokens broken into lines */
export function brokenLines(labels, room = WIDE) {
  const lines = [[]];
  let x = 0;
  labels.forEach((label, column) => {
    const text = short(label, 24);
    const wide = [...text].length * LETTER + 6;
    if (x + wide > room && lines.at(-1).length) {
      lines.push([]);
      x = 0;
    }
    lines.at(-1).push({ column, text, x, wide });
    x += wide;
  });
  return lines;
}

/** Return the picture of what a neuron fires on and writes. */
export function examplesPicture({ title, theme, shown, shadeOf, signed }) {
  const { examples, effect } = shown ?? { examples: [], effect: null };
  const broken = examples.map(({ labels }) => brokenLines(labels));
  const lines = broken.reduce((sum, each) => sum + each.length + 0.35, 0);
  const bars = effect ? Math.max(effect.promoted.length, effect.suppressed.length) : 0;
  const below = 44 + lines * LINE;
  const [made, pen] = sheet(WIDE + LEFT + 20, below + (bars ? bars * 20 + 40 : 10), theme, title);
  pen.textBaseline = "middle";
  pen.font = `12px ${MONO}`;
  const top = Math.max(0, ...examples.flatMap(({ activations }) => activations));
  let y = 44;
  broken.forEach((each, row) => {
    const { activation, activations, index } = examples[row];
    pen.fillStyle = theme.muted;
    pen.fillText(activation.toFixed(3), 16, y + LINE / 2);
    for (const line of each) {
      for (const { column, text, x, wide } of line) {
        const ground = mixed(theme.ramp, shadeOf(activations[column], top));
        pen.fillStyle = cssOf(ground);
        pen.fillRect(LEFT + x, y + 2, wide - 1, LINE - 4);
        pen.fillStyle = inkOn(ground, theme);
        pen.fillText(text, LEFT + x + 3, y + LINE / 2);
        pen.strokeStyle = theme.warm;
        pen.lineWidth = 2;
        if (column === index) pen.strokeRect(LEFT + x + 1, y + 3, wide - 3, LINE - 6);
      }
      y += LINE;
    }
    y += 0.35 * LINE;
  });
  if (effect) drawBars(pen, effect, below, theme, signed);
  return made;
}

function drawBars(pen, effect, below, theme, signed) {
  const most = Math.max(1e-9, ...[...effect.promoted, ...effect.suppressed].map(([, , value]) => Math.abs(value)));
  [["promoted", 4], ["suppressed", 2]].forEach(([side, colour], at) => {
    const [left, wide] = [16 + at * 440, 420];
    pen.fillStyle = theme.muted;
    pen.fillText(side, left, below + 14);
    effect[side].forEach(([, label, value], row) => {
      const y = below + 28 + row * 20;
      pen.fillStyle = theme.diverging[colour];
      pen.fillRect(left, y, (wide * Math.abs(value)) / most, 18);
      pen.fillStyle = theme.ink;
      pen.fillText(short(label, 24), left + 6, y + 9);
      pen.textAlign = "right";
      pen.fillText(signed(value), left + wide - 6, y + 9);
      pen.textAlign = "left";
    });
  });
}
