// Arrays as they arrive: a description with bytes in the state, in a message's buffer, or as base64.

const KINDS = { f4: Float32Array, i4: Int32Array, u1: Uint8Array };

/**
 * Replace descriptions of arrays by `{ shape, data }` with a typed array.
 * @param {any} value JSON with `{ dtype, shape, data }` in it
 * @param {DataView[]} buffers of the message, where data is a number
 */
export function unpacked(value, buffers = []) {
  if (Array.isArray(value)) return value.map((item) => unpacked(item, buffers));
  if (value === null || typeof value !== "object") return value;
  if (value.dtype in KINDS && Array.isArray(value.shape)) {
    return { shape: value.shape, data: typed(KINDS[value.dtype], value.data, buffers) };
  }
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, unpacked(item, buffers)]));
}

function typed(Kind, data, buffers) {
  let bytes;
  if (typeof data === "string") bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
  else {
    const view = typeof data === "number" ? buffers[data] : data;
    bytes = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  }
  // A window into a longer message need not begin where numbers of four bytes may.
  if (bytes.byteOffset % Kind.BYTES_PER_ELEMENT) bytes = bytes.slice();
  return new Kind(bytes.buffer, bytes.byteOffset, bytes.byteLength / Kind.BYTES_PER_ELEMENT);
}

/** @returns {any} the part of a typed array that an index into its first axes names */
export function slice({ shape, data }, ...index) {
  let size = data.length;
  let start = 0;
  index.forEach((place, axis) => {
    size /= shape[axis];
    start += place * size;
  });
  return { shape: shape.slice(index.length), data: data.subarray(start, start + size) };
}

/**
 * Shrink levels, each cell becoming the largest of a block; 255 stays only where all are masked.
 * @returns {{ data: Uint8Array, rows: number, columns: number, step: number }}
 */
export function poolLevels(data, rows, columns, most) {
  const step = Math.max(1, Math.ceil(Math.max(rows, columns) / most));
  if (step === 1) return { data, rows, columns, step };
  const [height, width] = [Math.ceil(rows / step), Math.ceil(columns / step)];
  const out = new Uint8Array(height * width).fill(255);
  for (let row = 0; row < rows; row += 1) {
    const base = Math.floor(row / step) * width;
    for (let column = 0; column < columns; column += 1) {
      const level = data[row * columns + column];
      if (level === 255) continue;
      const place = base + Math.floor(column / step);
      if (out[place] === 255 || level > out[place]) out[place] = level;
    }
  }
  return { data: out, rows: height, columns: width, step };
}
