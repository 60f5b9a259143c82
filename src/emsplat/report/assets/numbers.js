// Arrays out of the page, small linear algebra, colours.

const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const sum = (values) => values.reduce((a, b) => a + b, 0);

/** An array of the page: {kind, shape, data}, and for 16-bit numbers the low end and step of each column. */
function unpack(packed) {
  const text = atob(packed.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  // Typed arrays have the byte order of the processor; every one that runs a browser today is little endian.
  if (packed.kind === "float32") return new Float32Array(bytes.buffer);
  if (packed.kind === "int32") return new Int32Array(bytes.buffer);
  const levels = new Uint16Array(bytes.buffer);
  const values = new Float32Array(levels.length);
  const columns = packed.low.length;
  for (let i = 0; i < levels.length; i++) values[i] = packed.low[i % columns] + levels[i] * packed.step[i % columns];
  return values;
}

/** Eigenvalues, largest first, and eigenvectors (rows) of a symmetric matrix, by Jacobi's rotations. */
function eigen(matrix) {
  const n = matrix.length;
  const a = matrix.map((row) => Float64Array.from(row));
  const v = a.map((_, i) => Float64Array.from({ length: n }, (_, j) => +(i === j)));
  for (let sweep = 0; sweep < 30; sweep++) {
    let off = 0, whole = 0;
    for (let i = 0; i < n; i++) for (let j = 0; j <= i; j++) {
      if (i === j) whole += a[i][i] * a[i][i];
      else off += a[i][j] * a[i][j];
    }
    if (off <= 1e-24 * whole) break;
    for (let p = 0; p < n; p++) {
      for (let q = p + 1; q < n; q++) {
        if (a[p][q] === 0) continue;
        const theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
        const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1));
        const c = 1 / Math.sqrt(t * t + 1), s = t * c;
        for (let k = 0; k < n; k++) {
          const x = a[k][p], y = a[k][q];
          a[k][p] = c * x - s * y;
          a[k][q] = s * x + c * y;
        }
        for (let k = 0; k < n; k++) {
          const x = a[p][k], y = a[q][k];
          a[p][k] = c * x - s * y;
          a[q][k] = s * x + c * y;
          const u = v[p][k], w = v[q][k];
          v[p][k] = c * u - s * w;
          v[q][k] = s * u + c * w;
        }
      }
    }
  }
  const order = [...v.keys()].sort((i, j) => a[j][j] - a[i][i]);
  return { values: order.map((i) => a[i][i]), vectors: order.map((i) => v[i]) };
}

/** Values at some fractions (ascending) of a column of numbers, from at most 20,000 of them. */
function quantiles(values, fractions) {
  const stride = Math.max(1, Math.floor(values.length / 20000));
  const some = Float64Array.from({ length: Math.ceil(values.length / stride) }, (_, i) => values[i * stride]).sort();
  return fractions.map((fraction) => some[Math.round(fraction * (some.length - 1))] ?? 0);
}

// Okabe and Ito's colours can be told apart with any kind of colour vision; the others follow for many parts or classes.
const CATEGORIES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b7a800", "#7f6bb3",
  "#7a8b3a", "#a0522d", "#2f8f9d", "#8c96a3"];

/** Colour maps, as stops at equal distances: lightness rises evenly, or (cyclic) comes back to where it began. */
const MAPS = {
  viridis: ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"],
  heat: ["#2b5c8a", "#4f83a8", "#86a8b8", "#c9c6b5", "#e8b574", "#df8445", "#c2502d", "#8f1d2c"],
  cyclic: ["#c9506b", "#d98a3d", "#9aa63a", "#3fa468", "#2e9fa6", "#4a7fd0", "#8b62c9", "#c452a5", "#c9506b"],
};

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const css = (colour) => `rgb(${colour.map(Math.round).join(" ")})`;
const category = (i) => rgb(CATEGORIES[((i % CATEGORIES.length) + CATEGORIES.length) % CATEGORIES.length]);

/** 256 colours of a map, as a table of bytes. */
const tables = Object.fromEntries(Object.entries(MAPS).map(([name, stops]) => {
  const colours = stops.map(rgb);
  return [name, Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (colours.length - 1);
    const below = Math.min(colours.length - 2, Math.floor(place));
    return colours[below].map((c, k) => c + (place - below) * (colours[below + 1][k] - c));
  })];
}));

/** A number with the digits that its size deserves. */
function shown(value, digits = 3) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 10 ** digits) return Math.round(Number(value.toPrecision(digits))).toLocaleString("en").replace("-", "−");
  const decimals = clamp(digits - 1 - Math.floor(Math.log10(size)), 0, 4);
  return (size < 1e-3 ? value.toPrecision(digits) : value.toFixed(decimals)).replace("-", "−");
}

/** A program of two shaders; what the compiler says becomes an error. */
function makeProgram(gl, shaders) {
  return twgl.createProgramInfo(gl, shaders, (message) => { throw new Error(message); });
}
