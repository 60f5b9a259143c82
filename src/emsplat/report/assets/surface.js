// The map of a state on a small grid, and its isosurface.

/** Adds Gaussians up on a grid that covers the molecule; the part that is occupied is all that is cleared or looked at. */
class Density {
  constructor(step) {
    this.step = step; // Å per voxel
    this.low = [0, 0, 0]; // lattice index of voxel (0, 0, 0): the lattice stays where it is while the molecule moves
    this.size = [0, 0, 0];
    this.values = new Float32Array(0);
    this.owner = new Int32Array(0); // the Gaussian that gives a voxel most
    this.strongest = new Float32Array(0);
  }

  /** `factor` 1 and then −1 gives differences. */
  fill({ position, amplitude, sigma }, { keep = false, factor = 1, box = null } = {}) {
    const { step } = this;
    const count = amplitude.length;
    if (!keep) this.#clear(box ?? boxOf(position, sigma, step), count);
    const [nx, ny, nz] = this.size;
    const [lx, ly, lz] = this.low;
    const { values, owner, strongest } = this;
    const wx = new Float32Array(64), wy = new Float32Array(64);
    for (let i = 0; i < count; i++) {
      // A Gaussian narrower than the voxels would fall between them; a wider one of the same mass does not.
      const s = Math.max(sigma[i] / step, 0.75);
      const reach = Math.min(2.6 * s, 30);
      const x = position[3 * i] / step - lx, y = position[3 * i + 1] / step - ly, z = position[3 * i + 2] / step - lz;
      const x0 = Math.max(0, Math.ceil(x - reach)), x1 = Math.min(nx - 1, Math.floor(x + reach));
      const y0 = Math.max(0, Math.ceil(y - reach)), y1 = Math.min(ny - 1, Math.floor(y + reach));
      const z0 = Math.max(0, Math.ceil(z - reach)), z1 = Math.min(nz - 1, Math.floor(z + reach));
      const c = -0.5 / (s * s);
      const scale = (factor * amplitude[i]) / Math.pow(2 * Math.PI * s * s * step * step, 1.5);
      for (let k = x0; k <= x1; k++) wx[k - x0] = Math.exp(c * (k - x) * (k - x));
      for (let k = y0; k <= y1; k++) wy[k - y0] = Math.exp(c * (k - y) * (k - y));
      for (let kz = z0; kz <= z1; kz++) {
        const fz = scale * Math.exp(c * (kz - z) * (kz - z));
        for (let ky = y0; ky <= y1; ky++) {
          const fy = fz * wy[ky - y0];
          for (let kx = x0, n = (kz * ny + ky) * nx + x0; kx <= x1; kx++, n++) {
            const value = fy * wx[kx - x0];
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

  #clear([low, high]) {
    this.low = low;
    this.size = low.map((l, x) => high[x] - l + 1);
    const length = this.size[0] * this.size[1] * this.size[2];
    if (length > this.values.length) {
      this.values = new Float32Array(Math.ceil(1.25 * length));
      this.owner = new Int32Array(this.values.length);
      this.strongest = new Float32Array(this.values.length);
    } else {
      this.values.fill(0, 0, length);
      this.strongest.fill(0, 0, length);
    }
    this.owner.fill(0, 0, length);
  }

  /** A function that says which level a fraction of the mass lies above. */
  levels() {
    const length = this.size[0] * this.size[1] * this.size[2];
    const sorted = this.values.slice(0, length).filter((value) => value > 0).sort();
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

/** Lattice indices of the lowest and highest corner around some Gaussians. */
function boxOf(position, sigma, step) {
  const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity];
  let widest = 0;
  for (let i = 0; i < sigma.length; i++) {
    if (sigma[i] > widest) widest = sigma[i];
    for (let x = 0; x < 3; x++) {
      const value = position[3 * i + x];
      if (value < low[x]) low[x] = value;
      if (value > high[x]) high[x] = value;
    }
  }
  const margin = 2.6 * widest + 2 * step;
  return [low.map((v) => Math.floor((v - margin) / step)), high.map((v) => Math.ceil((v + margin) / step))];
}

/** Isosurface of a density by surface nets (Gibson 1998): one vertex in each voxel that the surface goes through.
 *
 * Vertices carry position, normal, how open they lie (ambient occlusion, from the density some Å above them) and colour. `colour(i)`
 * is that of Gaussian i. Buffers are kept, so that a moving molecule makes no garbage.
 */
class Surface {
  constructor() {
    this.position = new Float32Array(0);
    this.normal = new Float32Array(0);
    this.colour = new Uint8Array(0); // r, g, b, openness
    this.triangles = new Uint32Array(0);
    this.vertices = 0;
    this.indices = 0;
    this.place = new Int32Array(0);
  }

  extract(density, level, colours, sign = 1) {
    const { values, owner, size: [nx, ny, nz], low, step } = density;
    const slice = nx * ny;
    if (this.place.length < 2 * slice) this.place = new Int32Array(2 * slice);
    const corner = [0, 1, nx, nx + 1, slice, slice + 1, slice + nx, slice + nx + 1];
    const place = this.place;
    const d = new Float32Array(8);
    const cut = sign * level;
    this.vertices = this.indices = 0;
    for (let z = 0; z < nz - 1; z++) {
      const here = (z & 1) * slice, below = slice - here;
      for (let y = 0; y < ny - 1; y++) {
        let n = z * slice + y * nx;
        let right = this.#side(values, n, nx, slice, cut, sign);
        for (let x = 0; x < nx - 1; x++, n++) {
          const left = right;
          right = this.#side(values, n + 1, nx, slice, cut, sign);
          const mask = left | (right << 1);
          if (mask === 0 || mask === 255) continue;
          for (let k = 0; k < 8; k++) d[k] = values[n + corner[k]];
          place[here + y * nx + x] = this.#vertex(d, mask, cut, sign, n, corner, owner, colours, density, x, y, z, low, step);
          // A quad for each of the three edges from corner 0 that the surface crosses: around it lie four vertices.
          const inside = mask & 1;
          if (y > 0 && z > 0 && inside !== ((mask >> 1) & 1)) {
            const at = y * nx + x;
            this.#quad(place[here + at], place[here + at - nx], place[below + at - nx], place[below + at]);
          }
          if (x > 0 && z > 0 && inside !== ((mask >> 2) & 1)) {
            const at = y * nx + x;
            this.#quad(place[here + at], place[below + at], place[below + at - 1], place[here + at - 1]);
          }
          if (x > 0 && y > 0 && inside !== ((mask >> 4) & 1)) {
            const at = here + y * nx + x;
            this.#quad(place[at], place[at - 1], place[at - 1 - nx], place[at - nx]);
          }
        }
      }
    }
    return this;
  }

  /** Which of the four corners at one x lie inside: bits 0, 2, 4, 6 for (y, z), (y + 1, z), (y, z + 1), (y + 1, z + 1). */
  #side(values, n, nx, slice, cut, sign) {
    return sign > 0
      ? +(values[n] > cut) | (+(values[n + nx] > cut) << 2) | (+(values[n + slice] > cut) << 4) | (+(values[n + slice + nx] > cut) << 6)
      : +(values[n] < cut) | (+(values[n + nx] < cut) << 2) | (+(values[n + slice] < cut) << 4) | (+(values[n + slice + nx] < cut) << 6);
  }

  #vertex(d, mask, cut, sign, n, corner, owner, colours, density, x, y, z, low, step) {
    let px = 0, py = 0, pz = 0, crossed = 0;
    for (let axis = 1; axis <= 4; axis <<= 1) {
      for (let a = 0; a < 8; a++) {
        if (a & axis) continue;
        const b = a | axis;
        if (((mask >> a) & 1) === ((mask >> b) & 1)) continue;
        const t = (cut - d[a]) / (d[b] - d[a]);
        px += axis === 1 ? t : a & 1;
        py += axis === 2 ? t : (a >> 1) & 1;
        pz += axis === 4 ? t : a >> 2;
        crossed++;
      }
    }
    px /= crossed;
    py /= crossed;
    pz /= crossed;
    const qx = 1 - px, qy = 1 - py, qz = 1 - pz;
    let gx = qy * qz * (d[1] - d[0]) + py * qz * (d[3] - d[2]) + qy * pz * (d[5] - d[4]) + py * pz * (d[7] - d[6]);
    let gy = qx * qz * (d[2] - d[0]) + px * qz * (d[3] - d[1]) + qx * pz * (d[6] - d[4]) + px * pz * (d[7] - d[5]);
    let gz = qx * qy * (d[4] - d[0]) + px * qy * (d[5] - d[1]) + qx * py * (d[6] - d[2]) + px * py * (d[7] - d[3]);
    const size = -sign / (Math.sqrt(gx * gx + gy * gy + gz * gz) || 1);
    gx *= size;
    gy *= size;
    gz *= size;
    const v = this.vertices++;
    if (3 * v >= this.position.length) this.#growVertices();
    this.position[3 * v] = (x + px + low[0]) * step;
    this.position[3 * v + 1] = (y + py + low[1]) * step;
    this.position[3 * v + 2] = (z + pz + low[2]) * step;
    this.normal[3 * v] = gx;
    this.normal[3 * v + 1] = gy;
    this.normal[3 * v + 2] = gz;
    let r = 0, g = 0, b = 0;
    for (let k = 0; k < 8; k++) {
      const c = 3 * owner[n + corner[k]];
      r += colours[c];
      g += colours[c + 1];
      b += colours[c + 2];
    }
    // Clefts are darker: density above the surface, 4 and 9 Å out, keeps light away.
    let shade = 0;
    for (let k = 0; k < 2; k++) {
      const out = (k ? 9 : 4) / step;
      const ix = Math.round(x + px + out * gx), iy = Math.round(y + py + out * gy), iz = Math.round(z + pz + out * gz);
      const [nx, ny, nz] = density.size;
      if (ix >= 0 && iy >= 0 && iz >= 0 && ix < nx && iy < ny && iz < nz) {
        shade += clamp((sign * density.values[(iz * ny + iy) * nx + ix]) / (sign * cut), 0, 1);
      }
    }
    this.colour[4 * v] = r / 8;
    this.colour[4 * v + 1] = g / 8;
    this.colour[4 * v + 2] = b / 8;
    this.colour[4 * v + 3] = 255 * (1 - 0.28 * shade);
    return v;
  }

  /** Two triangles; both of their sides are shown, so their sense does not matter. */
  #quad(a, b, c, d) {
    if (this.indices + 6 > this.triangles.length) this.triangles = grown(this.triangles, 6 * 4096);
    const t = this.triangles, n = this.indices;
    this.indices += 6;
    t[n] = t[n + 3] = a;
    t[n + 1] = b;
    t[n + 2] = t[n + 4] = c;
    t[n + 5] = d;
  }

  #growVertices() {
    this.position = grown(this.position, 3 * 8192);
    this.normal = grown(this.normal, 3 * 8192);
    this.colour = grown(this.colour, 4 * 8192);
  }
}

/** The same numbers in an array twice as long. */
function grown(array, least) {
  const longer = new array.constructor(Math.max(least, 2 * array.length));
  longer.set(array);
  return longer;
}
