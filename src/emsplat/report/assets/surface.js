// Gaussians summed up on the CPU: on a small grid with its isosurface, and on a plane as a projection.
//
// Both are a few million multiplications on typed arrays. Blending that many sprites takes a graphics card no time, but
// browsers without one, and many have none that they trust, ten times what this does.

const REACH = 2.6; // σ; what is cut off is 3 % of a peak

/** Adds Gaussians up on a grid around the molecule. Of each row in x, the stretch that was written is kept: most are empty. */
class Density {
  constructor(step) {
    this.step = step; // Å per voxel
    this.low = [0, 0, 0]; // lattice index of voxel (0, 0, 0): the lattice stays where it is while the molecule moves
    this.size = [0, 0, 0];
    this.values = new Float32Array(0);
    this.strongest = new Float32Array(0); // what one Gaussian gives a voxel at most
    this.owner = new Uint32Array(0); // and which one does
    this.first = new Int32Array(0); // of each row (z, y): the stretch in x that is not empty
    this.last = new Int32Array(0);
  }

  /** Gaussians lower than `least` at their peaks are left out; all are blurred by `blur` Å. */
  fill({ position, amplitude, sigma }, { box = null, least = 0, blur = 0 } = {}) {
    this.#clear(box ?? boxOf(position, sigma, this.step, amplitude, least, blur));
    const { step, values, owner, strongest, first, last, size: [nx, ny, nz], low: [lx, ly, lz] } = this;
    const wx = new Float64Array(128), wy = new Float64Array(128);
    const unit = Math.pow(2 * Math.PI, -1.5) / (step * step * step);
    for (let i = 0; i < amplitude.length; i++) {
      // A Gaussian narrower than the voxels would fall between them; a wider one of the same mass does not.
      const s = Math.max(Math.sqrt(sigma[i] * sigma[i] + blur * blur) / step, 0.75);
      const peak = (amplitude[i] * unit) / (s * s * s);
      if (peak < least) continue;
      const reach = Math.min(REACH * s, 60);
      const x = position[3 * i] / step - lx, y = position[3 * i + 1] / step - ly, z = position[3 * i + 2] / step - lz;
      const x0 = Math.max(0, Math.ceil(x - reach)), x1 = Math.min(nx - 1, Math.floor(x + reach));
      const y0 = Math.max(0, Math.ceil(y - reach)), y1 = Math.min(ny - 1, Math.floor(y + reach));
      const z0 = Math.max(0, Math.ceil(z - reach)), z1 = Math.min(nz - 1, Math.floor(z + reach));
      const c = -0.5 / (s * s);
      for (let k = x0; k <= x1; k++) wx[k - x0] = peak * Math.exp(c * (k - x) * (k - x));
      for (let k = y0; k <= y1; k++) wy[k - y0] = Math.exp(c * (k - y) * (k - y));
      for (let kz = z0; kz <= z1; kz++) {
        // A ball, not a cube: half the voxels.
        const dz = (kz - z) * (kz - z), wz = Math.exp(c * dz);
        for (let ky = y0; ky <= y1; ky++) {
          const room = reach * reach - dz - (ky - y) * (ky - y);
          if (room <= 0) continue;
          const half = Math.sqrt(room);
          const from = Math.max(x0, Math.ceil(x - half)), to = Math.min(x1, Math.floor(x + half));
          if (from > to) continue;
          const share = wz * wy[ky - y0], line = kz * ny + ky;
          if (from < first[line]) first[line] = from;
          if (to > last[line]) last[line] = to;
          for (let kx = from, n = line * nx + from; kx <= to; kx++, n++) {
            const value = share * wx[kx - x0];
            values[n] += value;
            if (value > strongest[n]) {
              strongest[n] = value;
              owner[n] = i;
            }
          }
        }
      }
    }
    return this;
  }

  /** What one density has more than another in the same box. */
  subtract(one, other) {
    this.step = one.step;
    this.#clear(one.box);
    const { values, first, last, size: [nx, ny, nz] } = this;
    for (let line = 0; line < ny * nz; line++) {
      const from = Math.min(one.first[line], other.first[line]), to = Math.max(one.last[line], other.last[line]);
      first[line] = from;
      last[line] = to;
      for (let n = line * nx + from; n <= line * nx + to; n++) values[n] = one.values[n] - other.values[n];
    }
    return this;
  }

  get box() {
    return [this.low, this.low.map((low, x) => low + this.size[x] - 1)];
  }

  #clear([low, high]) {
    const [nx] = this.size;
    const rows = this.size[1] * this.size[2];
    for (let line = 0; line < rows; line++) {
      if (this.last[line] < 0) continue;
      const from = line * nx + this.first[line], to = line * nx + this.last[line] + 1;
      this.values.fill(0, from, to);
      this.strongest.fill(0, from, to);
    }
    this.low = low;
    this.size = low.map((l, x) => high[x] - l + 1);
    const lines = this.size[1] * this.size[2], length = this.size[0] * lines;
    if (length > this.values.length) {
      this.values = new Float32Array(Math.ceil(1.25 * length));
      this.strongest = new Float32Array(this.values.length);
      this.owner = new Uint32Array(this.values.length);
    }
    if (lines > this.first.length) {
      this.first = new Int32Array(Math.ceil(1.25 * lines));
      this.last = new Int32Array(this.first.length);
    }
    this.first.fill(this.size[0], 0, lines);
    this.last.fill(-1, 0, lines);
  }

  /** A function that says which level a fraction of the mass lies above. */
  levels() {
    const sorted = this.values.filter((value) => value > 0).sort();
    const above = new Float64Array(sorted.length + 1); // mass from voxel i of `sorted` on
    for (let i = sorted.length - 1; i >= 0; i--) above[i] = above[i + 1] + sorted[i];
    return (fraction) => {
      let low = 0, high = sorted.length;
      while (high - low > 1) {
        const between = (low + high) >> 1;
        if (above[between] >= fraction * above[0]) low = between;
        else high = between;
      }
      return sorted[low] ?? 0;
    };
  }
}

/** Lattice indices of the lowest and highest corner around Gaussians with peaks above `least`. */
function boxOf(position, sigma, step, amplitude, least, blur = 0) {
  const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity];
  for (let i = 0; i < sigma.length; i++) {
    const s = Math.max(Math.sqrt(sigma[i] * sigma[i] + blur * blur), 0.75 * step);
    if (amplitude[i] < least * Math.pow(2 * Math.PI * s * s, 1.5)) continue;
    const margin = REACH * s + 2 * step;
    for (let x = 0; x < 3; x++) {
      const value = position[3 * i + x];
      if (value - margin < low[x]) low[x] = value - margin;
      if (value + margin > high[x]) high[x] = value + margin;
    }
  }
  return [low.map((v) => Math.floor(v / step)), high.map((v) => Math.ceil(v / step))];
}

const union = (a, b) => [a[0].map((v, x) => Math.min(v, b[0][x])), a[1].map((v, x) => Math.max(v, b[1][x]))];

/** Isosurface of a density by surface nets (Gibson 1998): one vertex in each cell that the surface goes through.
 *
 * Vertices carry position, normal, colour (of the Gaussians that own the corners) and how open they lie: density above
 * the surface keeps light away. Buffers are kept, so that a moving molecule makes no garbage.
 */
class Surface {
  constructor() {
    this.position = new Float32Array(0);
    this.normal = new Float32Array(0);
    this.colour = new Uint8Array(0); // r, g, b, openness
    this.triangles = new Uint32Array(0);
    this.vertices = 0;
    this.indices = 0;
    this.place = new Int32Array(0); // vertices of the cells of two slices
    this.corner = new Float64Array(8);
  }

  /** Where `sign` times the density is above `level`; colours of Gaussians as bytes. */
  extract(density, level, colours, sign = 1) {
    const { values, first, last, size: [nx, ny, nz] } = density;
    const slice = nx * ny;
    if (this.place.length < 2 * slice) this.place = new Int32Array(2 * slice);
    const place = this.place;
    this.vertices = this.indices = 0;
    for (let z = 0; z < nz - 1; z++) {
      const here = (z & 1) * slice, below = slice - here;
      for (let y = 0; y < ny - 1; y++) {
        const a = z * ny + y, b = a + 1, c = a + ny, d = c + 1;
        const from = Math.max(0, Math.min(first[a], first[b], first[c], first[d]) - 1);
        const to = Math.min(nx - 2, Math.max(last[a], last[b], last[c], last[d]));
        let right = 0;
        for (let x = from, n = a * nx + from; x <= to; x++, n++) {
          // Bits: corner x + 2 y + 4 z lies inside. Before the stretch, and in the first column (`boxOf`), there is nothing.
          const left = right, m = n + 1;
          right = (sign * values[m] > level ? 1 : 0) | (sign * values[m + nx] > level ? 4 : 0)
            | (sign * values[m + slice] > level ? 16 : 0) | (sign * values[m + slice + nx] > level ? 64 : 0);
          const mask = left | (right << 1);
          if (mask === 0 || mask === 255) continue;
          const at = y * nx + x;
          place[here + at] = this.#vertex(density, level, colours, sign, mask, n, x, y, z);
          // A quad for each of the three edges from corner 0 that the surface crosses: around it lie four vertices.
          const inside = mask & 1;
          if (y > 0 && z > 0 && inside !== ((mask >> 1) & 1)) {
            this.#quad(place[here + at], place[here + at - nx], place[below + at - nx], place[below + at], inside);
          }
          if (x > 0 && z > 0 && inside !== ((mask >> 2) & 1)) {
            this.#quad(place[here + at], place[below + at], place[below + at - 1], place[here + at - 1], inside);
          }
          if (x > 0 && y > 0 && inside !== ((mask >> 4) & 1)) {
            this.#quad(place[here + at], place[here + at - 1], place[here + at - 1 - nx], place[here + at - nx], inside);
          }
        }
      }
    }
    return this;
  }

  #vertex({ values, owner, low, step, size: [nx, ny, nz] }, level, colours, sign, mask, n, x, y, z) {
    const d = this.corner;
    let r = 0, g = 0, b = 0, dense = 0; // corners where nothing is have no owner: each counts by its density
    for (let k = 0; k < 8; k++) {
      const m = n + (k & 1) + (k & 2 ? nx : 0) + (k & 4 ? nx * ny : 0);
      d[k] = sign * values[m];
      if (d[k] <= 0) continue;
      const c = 3 * owner[m];
      dense += d[k];
      r += d[k] * colours[c];
      g += d[k] * colours[c + 1];
      b += d[k] * colours[c + 2];
    }
    let px = 0, py = 0, pz = 0, crossed = 0;
    for (let e = 0; e < 24; e += 2) {
      const a = EDGES[e], c = EDGES[e + 1];
      if (((mask >> a) & 1) === ((mask >> c) & 1)) continue;
      const t = (level - d[a]) / (d[c] - d[a]);
      px += e < 8 ? t : a & 1;
      py += e >= 8 && e < 16 ? t : (a >> 1) & 1;
      pz += e >= 16 ? t : a >> 2;
      crossed++;
    }
    px /= crossed;
    py /= crossed;
    pz /= crossed;
    const qx = 1 - px, qy = 1 - py, qz = 1 - pz;
    let gx = qy * qz * (d[1] - d[0]) + py * qz * (d[3] - d[2]) + qy * pz * (d[5] - d[4]) + py * pz * (d[7] - d[6]);
    let gy = qx * qz * (d[2] - d[0]) + px * qz * (d[3] - d[1]) + qx * pz * (d[6] - d[4]) + px * pz * (d[7] - d[5]);
    let gz = qx * qy * (d[4] - d[0]) + px * qy * (d[5] - d[1]) + qx * py * (d[6] - d[2]) + px * py * (d[7] - d[3]);
    const outwards = -1 / (Math.sqrt(gx * gx + gy * gy + gz * gz) || 1);
    gx *= outwards;
    gy *= outwards;
    gz *= outwards;
    // Clefts are darker: density 4 and 9 Å above the surface.
    let shade = 0;
    for (let out = 4; out <= 9; out += 5) {
      const ix = Math.round(x + px + (out / step) * gx), iy = Math.round(y + py + (out / step) * gy), iz = Math.round(z + pz + (out / step) * gz);
      if (ix >= 0 && iy >= 0 && iz >= 0 && ix < nx && iy < ny && iz < nz) {
        shade += clamp((sign * values[(iz * ny + iy) * nx + ix]) / level, 0, 1);
      }
    }
    const v = this.vertices++;
    if (3 * v >= this.position.length) this.#growVertices();
    const { position, normal, colour } = this;
    position[3 * v] = (x + px + low[0]) * step;
    position[3 * v + 1] = (y + py + low[1]) * step;
    position[3 * v + 2] = (z + pz + low[2]) * step;
    normal[3 * v] = gx;
    normal[3 * v + 1] = gy;
    normal[3 * v + 2] = gz;
    colour[4 * v] = r / dense;
    colour[4 * v + 1] = g / dense;
    colour[4 * v + 2] = b / dense;
    colour[4 * v + 3] = 255 * (1 - 0.28 * shade);
    return v;
  }

  /** Two triangles, counter-clockwise as seen from outside. */
  #quad(a, b, c, d, inside) {
    if (this.indices + 6 > this.triangles.length) this.triangles = grown(this.triangles, 6 * 4096);
    const t = this.triangles, n = this.indices;
    this.indices += 6;
    t[n] = t[n + 3] = a;
    t[n + 1] = inside ? b : c;
    t[n + 2] = inside ? c : b;
    t[n + 4] = inside ? c : d;
    t[n + 5] = inside ? d : c;
  }

  #growVertices() {
    this.position = grown(this.position, 3 * 8192);
    this.normal = grown(this.normal, 3 * 8192);
    this.colour = grown(this.colour, 4 * 8192);
  }
}

/** Ends of a cell's edges: four along x, four along y, four along z. */
const EDGES = Uint8Array.of(0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 1, 3, 4, 6, 5, 7, 0, 4, 1, 5, 2, 6, 3, 7);

/** The same numbers in an array twice as long. */
function grown(array, least) {
  const longer = new array.constructor(Math.max(least, 2 * array.length));
  longer.set(array);
  return longer;
}

/** Column densities on a plane of pixels: red, green, blue as the Gaussians' colours weigh them, and the sum. */
class Projection {
  constructor() {
    this.sums = new Float32Array(0);
    this.size = [0, 0];
  }

  begin(width, height) {
    this.size = [width, height];
    if (this.sums.length !== 4 * width * height) this.sums = new Float32Array(4 * width * height);
    else this.sums.fill(0);
  }

  /** `turn` to the camera; the middle of the plane sees `middle`; `scale` pixels per Å. `paint(i, out)` weighs the
   * channels; all are blurred by `blur` Å. */
  add({ position, amplitude, sigma }, { turn: [across, up], middle }, scale, paint, blur = 0) {
    const { sums, size: [width, height] } = this;
    const wx = new Float64Array(1024), weights = new Float64Array(4);
    const [ax, ay, az] = across, [ux, uy, uz] = up;
    for (let i = 0; i < amplitude.length; i++) {
      // Narrower than the pixels, it would fall between them.
      const s = Math.max(Math.sqrt(sigma[i] * sigma[i] + blur * blur) * scale, 0.6);
      const px = position[3 * i] - middle[0], py = position[3 * i + 1] - middle[1], pz = position[3 * i + 2] - middle[2];
      const x = (ax * px + ay * py + az * pz) * scale + width / 2 - 0.5, y = (ux * px + uy * py + uz * pz) * scale + height / 2 - 0.5;
      const reach = Math.min(REACH * s, 500);
      const x0 = Math.max(0, Math.ceil(x - reach)), x1 = Math.min(width - 1, Math.floor(x + reach));
      const y0 = Math.max(0, Math.ceil(y - reach)), y1 = Math.min(height - 1, Math.floor(y + reach));
      if (x0 > x1 || y0 > y1) continue;
      const c = -0.5 / (s * s);
      const peak = (amplitude[i] * scale * scale) / (2 * Math.PI * s * s);
      paint(i, weights);
      const [red, green, blue, whole] = weights;
      for (let k = x0; k <= x1; k++) wx[k - x0] = Math.exp(c * (k - x) * (k - x));
      for (let ky = y0; ky <= y1; ky++) {
        const square = (ky - y) * (ky - y);
        const half = Math.sqrt(Math.max(0, reach * reach - square));
        const from = Math.max(x0, Math.ceil(x - half)), to = Math.min(x1, Math.floor(x + half));
        const share = peak * Math.exp(c * square);
        for (let kx = from, n = 4 * (ky * width + from); kx <= to; kx++, n += 4) {
          const value = share * wx[kx - x0];
          sums[n] += red * value;
          sums[n + 1] += green * value;
          sums[n + 2] += blue * value;
          sums[n + 3] += whole * value;
        }
      }
    }
  }
}
