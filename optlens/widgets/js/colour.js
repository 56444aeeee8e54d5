// Colours: tables for canvases, the ink that can be read upon a ground. Pure functions.

/** @returns {number[]} red, green, blue of "#rrggbb" */
export function rgbOf(hex) {
  return [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
}

/** @returns {number[]} the colour at a share 0..1 of a table of evenly spaced "#rrggbb" */
export function mixed(table, share) {
  const place = Math.min(Math.max(share, 0), 1) * (table.length - 1);
  const left = Math.min(Math.floor(place), table.length - 2);
  const [low, high] = [rgbOf(table[left]), rgbOf(table[left + 1])];
  return low.map((channel, i) => Math.round(channel + (high[i] - channel) * (place - left)));
}

export function cssOf([red, green, blue]) {
  return `rgb(${red}, ${green}, ${blue})`;
}

/** @returns {number} relative luminance of a colour, 0..1 */
export function luminance(rgb) {
  const [r, g, b] = rgb.map((channel) => {
    const c = channel / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** @returns {number} contrast of two colours as WCAG defines it, 1..21 */
export function contrast(one, other) {
  const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}

/** @returns {string} the theme's ink or paper, whichever stands out from a ground */
export function inkOn(rgb, theme) {
  return contrast(rgb, rgbOf(theme.ink)) >= contrast(rgb, rgbOf(theme.paper)) ? theme.ink : theme.paper;
}

/** A pixel as canvases hold it on every machine with a browser: little-endian ABGR. */
export function pixel([red, green, blue]) {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

/** @returns {Uint32Array} pixels for levels 0..254 of a ramp; 255 is what cannot be seen */
export function levelTable(ramp, masked) {
  const table = new Uint32Array(256);
  for (let level = 0; level < 255; level += 1) table[level] = pixel(mixed(ramp, level / 254));
  table[255] = pixel(rgbOf(masked));
  return table;
}

/** @returns {number} the level of an attention weight, on a square-root scale; 255 for NaN */
export function levelOf(weight) {
  return Number.isNaN(weight) ? 255 : Math.round(254 * Math.sqrt(Math.min(Math.max(weight, 0), 1)));
}

/** @returns {number} the weight in the middle of a level; NaN for 255 */
export function weightOf(level) {
  return level === 255 ? NaN : (level / 254) ** 2;
}
