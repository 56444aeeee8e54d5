// Numbers and tokens as people read them. Pure functions.

/** @returns {string} a share as per cent, never rounded to certainty: "93.1 %", "< 0.1 %" */
export function percent(share) {
  if (Number.isNaN(share)) return "–";
  if (share > 0 && share < 0.0005) return "< 0.1 %";
  if (share >= 0.9995 && share < 1) return "> 99.9 %";
  return `${(100 * share).toFixed(1)} %`;
}

/** @returns {string} a number with three significant digits, without an exponent where that is short */
export function number(value) {
  if (Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 100 && size < 1e5) return value.toFixed(0);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1);
  return size >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** @returns {string} text cut in its middle */
export function short(text, most = 14) {
  const chars = [...text];
  if (chars.length <= most) return text;
  const front = Math.ceil((most - 1) / 2);
  return `${chars.slice(0, front).join("")}…${chars.slice(chars.length - (most - 1 - front)).join("")}`;
}

/** @returns {string} a token in words for a screen reader: "·Mary" is "space Mary" */
export function spoken(label) {
  const names = { "·": "space ", "↵": "line break ", "⇥": "tab ", "∅": "empty " };
  return [...label].map((char) => names[char] ?? char).join("").trim();
}

/** @returns {string} a table as comma-separated values; nothing in it can begin a formula */
export function csvOf(rows) {
  const cell = (value) => {
    let text = String(value);
    if (/^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text))) text = `'${text}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
}
