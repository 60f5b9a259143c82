// The decoder, as emsplat.models.decoder.Decoder.forward: what is said there holds here.

const softplus = (x) => (x > 30 ? x : Math.log1p(Math.exp(x)));

class Decoder {
  constructor(packed) {
    this.half = packed.half;
    this.length = packed.length;
    this.unit = packed.unit;
    for (const name of ["centre", "width", "amplitude", "logits", "bend", "change"]) this[name] = unpack(packed[name]);
    this.count = this.width.length;
    this.parts = packed.logits.shape[1];
    this.changes = packed.change.shape[1];
    this.bends = packed.bend.shape[1] / 3;
    this.layers = packed.weights.map((weight, i) => ({
      weight: unpack(weight), bias: unpack(packed.biases[i]), outputs: weight.shape[0], inputs: weight.shape[1],
    }));
    this.latents = this.layers[0].inputs;
    this.frame = packed.frame && unpack(packed.frame);
    this.sigma = this.width.map((raw) => this.length * Math.exp(raw));
    this.#findParts(packed.part && unpack(packed.part));
  }

  /** Weights of the parts (softmax of the logits), the part that each Gaussian is shown as (`given`, or that which it
   *  belongs to most), and their origins. */
  #findParts(given) {
    const { count, parts } = this;
    this.weight = new Float32Array(count * parts);
    this.part = new Uint8Array(count);
    this.origin = new Float64Array(3 * parts);
    this.mass = new Float64Array(parts); // of the Gaussians that are shown as a part
    const total = new Float64Array(parts);
    const own = new Float64Array(parts);
    for (let i = 0; i < count; i++) {
      let most = 0, whole = 0;
      for (let p = 1; p < parts; p++) if (this.logits[i * parts + p] > this.logits[i * parts + most]) most = p;
      for (let p = 0; p < parts; p++) {
        own[p] = Math.exp(this.logits[i * parts + p] - this.logits[i * parts + most]);
        whole += own[p];
      }
      const amplitude = softplus(this.amplitude[i]);
      this.part[i] = given ? given[i] : most;
      this.mass[this.part[i]] += amplitude;
      for (let p = 0; p < parts; p++) {
        this.weight[i * parts + p] = own[p] / whole;
        const mass = (own[p] / whole) * amplitude;
        total[p] += mass;
        for (let x = 0; x < 3; x++) this.origin[3 * p + x] += mass * this.centre[3 * i + x];
      }
    }
    for (let p = 0; p < parts; p++) for (let x = 0; x < 3; x++) this.origin[3 * p + x] /= total[p];
  }

  /** The latent of this half for a latent of the page. */
  own(latent) {
    if (!this.frame) return latent;
    const columns = latent.length + 1;
    return Float64Array.from({ length: this.latents }, (_, i) => {
      let value = this.frame[i * columns + columns - 1];
      for (let j = 0; j < latent.length; j++) value += this.frame[i * columns + j] * latent[j];
      return value;
    });
  }

  /** What a latent does: 12 numbers per part (rows of the rotation, then the shift that goes with it), a_k, b_k. */
  numbers(latent) {
    const own = this.own(latent);
    let hidden = own;
    for (const layer of this.layers.slice(0, 2)) {
      hidden = this.#times(layer, hidden).map((x) => x / (1 + Math.exp(-x)));
    }
    const raw = this.#times(this.layers[2], Float64Array.of(...hidden, ...own));
    const out = new Float64Array(12 * this.parts + this.bends + this.changes);
    for (let p = 0; p < this.parts; p++) this.#motion(raw.subarray(9 * p, 9 * p + 9), p, out.subarray(12 * p, 12 * p + 12));
    out.set(raw.subarray(9 * this.parts), 12 * this.parts);
    return out;
  }

  #times({ weight, bias, outputs, inputs }, values) {
    const out = new Float64Array(outputs);
    for (let i = 0; i < outputs; i++) {
      let value = bias[i];
      for (let j = 0; j < inputs; j++) value += weight[i * inputs + j] * values[j];
      out[i] = value;
    }
    return out;
  }

  #motion(raw, part, out) {
    const first = [raw[0] + 1, raw[1], raw[2]], second = [raw[3], raw[4] + 1, raw[5]];
    const x = normalised(first);
    const along = x[0] * second[0] + x[1] * second[1] + x[2] * second[2];
    const y = normalised(second.map((value, i) => value - along * x[i]));
    const z = cross(x, y);
    for (let i = 0; i < 3; i++) {
      const row = [x[i], y[i], z[i]];
      out.set(row, 3 * i);
      const origin = this.origin.subarray(3 * part, 3 * part + 3);
      out[9 + i] = raw[6 + i] + origin[i] - (row[0] * origin[0] + row[1] * origin[1] + row[2] * origin[2]);
    }
  }

  /** Positions (Å) and amplitudes of all Gaussians in the state of a latent. */
  decode(latent, position = new Float32Array(3 * this.count), amplitude = new Float32Array(this.count)) {
    const { parts, bends, changes, length, unit, weight, centre, bend, change } = this;
    const numbers = this.numbers(latent);
    const a = numbers.subarray(12 * parts, 12 * parts + bends), b = numbers.subarray(12 * parts + bends);
    for (let i = 0; i < this.count; i++) {
      const cx = centre[3 * i], cy = centre[3 * i + 1], cz = centre[3 * i + 2];
      let x = 0, y = 0, z = 0;
      for (let p = 0, w = i * parts, m = 0; p < parts; p++, w++, m += 12) {
        const share = weight[w];
        x += share * (numbers[m] * cx + numbers[m + 1] * cy + numbers[m + 2] * cz + numbers[m + 9]);
        y += share * (numbers[m + 3] * cx + numbers[m + 4] * cy + numbers[m + 5] * cz + numbers[m + 10]);
        z += share * (numbers[m + 6] * cx + numbers[m + 7] * cy + numbers[m + 8] * cz + numbers[m + 11]);
      }
      for (let k = 0, n = 3 * i * bends; k < bends; k++, n += 3) {
        x += a[k] * bend[n];
        y += a[k] * bend[n + 1];
        z += a[k] * bend[n + 2];
      }
      position[3 * i] = length * x;
      position[3 * i + 1] = length * y;
      position[3 * i + 2] = length * z;
      let raw = this.amplitude[i];
      for (let k = 0, n = i * changes; k < changes; k++, n++) raw += b[k] * change[n];
      amplitude[i] = unit * softplus(raw);
    }
    return { position, amplitude };
  }
}

/** How the parts move between the consensus and a state: the rigid motions that fit the Gaussians of each part best.
 *
 * Parts have soft borders, so the rotations inside the decoder are not those that one sees. Positions are linear in the
 * numbers of a latent, and so are the sums that the best rotation follows from (Horn 1987); with their coefficients kept,
 * a particle costs a few hundred multiplications, however many Gaussians there are.
 */
class Motions {
  constructor(decoder, consensus) {
    this.decoder = decoder;
    const { count, parts, bends } = decoder;
    const { position } = decoder.decode(consensus);
    // Per part: what each number adds to Σ m x yᵀ with y the consensus from its centre, and (column 3) to the mean of x.
    this.rigid = new Float64Array(parts * parts * 4 * 4);
    this.bent = new Float64Array(parts * bends * 3 * 4);
    this.centre = new Float64Array(3 * parts);
    const total = new Float64Array(parts);
    const mass = decoder.amplitude.map(softplus);
    for (let i = 0; i < count; i++) {
      const p = decoder.part[i];
      total[p] += mass[i];
      for (let x = 0; x < 3; x++) this.centre[3 * p + x] += mass[i] * position[3 * i + x];
    }
    for (let p = 0; p < parts; p++) for (let x = 0; x < 3; x++) this.centre[3 * p + x] /= Math.max(total[p], 1e-30);
    const y = new Float64Array(4);
    for (let i = 0; i < count; i++) {
      const p = decoder.part[i];
      for (let x = 0; x < 3; x++) y[x] = mass[i] * (position[3 * i + x] - this.centre[3 * p + x]);
      y[3] = mass[i] / Math.max(total[p], 1e-30);
      for (let other = 0; other < parts; other++) {
        for (let b = 0; b < 4; b++) {
          const value = decoder.weight[i * parts + other] * (b < 3 ? decoder.centre[3 * i + b] : 1);
          const n = ((p * parts + other) * 4 + b) * 4;
          for (let c = 0; c < 4; c++) this.rigid[n + c] += value * y[c];
        }
      }
      for (let k = 0; k < 3 * bends; k++) {
        const n = (p * 3 * bends + k) * 4;
        for (let c = 0; c < 4; c++) this.bent[n + c] += decoder.bend[3 * i * bends + k] * y[c];
      }
    }
  }

  /** Of one part in one state: the rotation as a quaternion (w, x, y, z), and how far its centre goes (Å). */
  of(part, numbers) {
    const { parts, bends, length } = this.decoder;
    const h = new Float64Array(12); // h[4 a + c]: Σ m x_a y_c; column 3: the mean of x
    for (let other = 0; other < parts; other++) {
      for (let a = 0; a < 3; a++) {
        for (let b = 0; b < 4; b++) {
          const value = numbers[12 * other + (b < 3 ? 3 * a + b : 9 + a)];
          const n = ((part * parts + other) * 4 + b) * 4;
          for (let c = 0; c < 4; c++) h[4 * a + c] += value * this.rigid[n + c];
        }
      }
    }
    for (let k = 0; k < bends; k++) {
      for (let a = 0; a < 3; a++) {
        const n = ((part * bends + k) * 3 + a) * 4;
        for (let c = 0; c < 4; c++) h[4 * a + c] += numbers[12 * parts + k] * this.bent[n + c];
      }
    }
    const shift = [0, 1, 2].map((a) => length * h[4 * a + 3] - this.centre[3 * part + a]);
    const s = (c, a) => h[4 * a + c];
    const best = eigen([
      [s(0, 0) + s(1, 1) + s(2, 2), s(1, 2) - s(2, 1), s(2, 0) - s(0, 2), s(0, 1) - s(1, 0)],
      [s(1, 2) - s(2, 1), s(0, 0) - s(1, 1) - s(2, 2), s(0, 1) + s(1, 0), s(2, 0) + s(0, 2)],
      [s(2, 0) - s(0, 2), s(0, 1) + s(1, 0), s(1, 1) - s(0, 0) - s(2, 2), s(1, 2) + s(2, 1)],
      [s(0, 1) - s(1, 0), s(2, 0) + s(0, 2), s(1, 2) + s(2, 1), s(2, 2) - s(0, 0) - s(1, 1)],
    ]).vectors[0];
    return { rotation: best[0] < 0 ? best.map((x) => -x) : best, shift };
  }
}

function normalised(v) {
  const size = Math.hypot(...v) || 1;
  return v.map((x) => x / size);
}

const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];

/** The product of two rotations as quaternions, and a rotation the other way. */
const turned = ([w, x, y, z], [a, b, c, d]) =>
  [w * a - x * b - y * c - z * d, w * b + x * a + y * d - z * c, w * c - x * d + y * a + z * b, w * d + x * c - y * b + z * a];
const back = ([w, x, y, z]) => [w, -x, -y, -z];
