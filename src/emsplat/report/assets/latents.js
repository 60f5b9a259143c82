// The latent plane: density and particles, what the pointer means there, and selection with a lasso.

const CELLS = 128; // of the grid that density and local means are kept on
const BLURS = [1.2, 2.4, 5, 10, 20]; // cells; where a fine blur has met no particle a coarser one decides

const POINT_VERTEX = `#version 300 es
in vec2 position;
in vec4 colour;
uniform vec2 scale, offset;
uniform float size;
out vec4 paint;
void main() {
  gl_Position = vec4(position * scale + offset, 0.0, 1.0);
  gl_PointSize = size;
  paint = colour;
}`;

const POINT_FRAGMENT = `#version 300 es
precision highp float;
in vec4 paint;
uniform float size;
out vec4 colour;
void main() {
  float edge = (0.5 - length(gl_PointCoord - 0.5)) * size;
  colour = vec4(paint.rgb, 1.0) * (paint.a * clamp(edge + 0.5, 0.0, 1.0));
}`;

class LatentPlane {
  constructor(stage, data, theme) {
    this.data = data;
    this.theme = theme;
    [this.under, this.over] = ["under", "over"].map((name) => stage.querySelector(`canvas.${name}`));
    this.marker = stage.querySelector(".marker");
    // Particles are drawn elsewhere and copied: each layer on the screen costs time whenever anything above or below moves.
    this.points = document.createElement("canvas");
    this.gl = this.points.getContext("webgl2", { antialias: false, premultipliedAlpha: true });
    if (!this.gl) throw new Error("WebGL 2 is not available in this browser");
    const { gl } = this, { count } = data;
    this.program = makeProgram(gl, [POINT_VERTEX, POINT_FRAGMENT]);
    // Drawn in a shuffled order, so that the later ones (half 2, the last micrographs) do not hide the others.
    this.order = shuffled(count);
    this.place = new Float32Array(2 * count);
    this.colours = new Uint8Array(4 * count);
    this.buffers = twgl.createBufferInfoFromArrays(gl, {
      position: { numComponents: 2, data: this.place.slice(), drawType: gl.DYNAMIC_DRAW },
      colour: { numComponents: 4, data: this.colours, normalize: true, drawType: gl.DYNAMIC_DRAW },
    });
    this.selected = new Uint8Array(count);
    this.measure();
    this.layers = { density: true, particles: true, states: true };
    this.#principal();
  }

  /** Components, and principal ones: of the maps where the page knows them, else of the latents. */
  #principal() {
    const { latent, count, latents: q } = this.data;
    this.mean = new Float64Array(q);
    for (let i = 0; i < count; i++) for (let j = 0; j < q; j++) this.mean[j] += latent[i * q + j] / count;
    const rows = this.data.principal ?? this.#ofLatents();
    const components = Array.from({ length: q }, (_, j) => Float64Array.from({ length: q }, (_, k) => +(j === k)));
    this.axes = [
      ...components.map((row, j) => ({ name: `z${j + 1}`, row, offset: 0 })),
      ...rows.map((row, j) => ({ name: `PC ${j + 1}`, row, offset: -sum(Array.from(row, (value, k) => value * this.mean[k])) })),
    ];
    // With one component alone the other axis only spreads the particles out.
    if (q === 1) this.axes.push({ name: "(spread)", row: null, offset: 0 });
  }

  #ofLatents() {
    const { latent, count, latents: q } = this.data;
    const spread = Array.from({ length: q }, () => new Float64Array(q));
    const d = new Float64Array(q);
    for (let i = 0; i < count; i++) {
      for (let j = 0; j < q; j++) d[j] = latent[i * q + j] - this.mean[j];
      for (let j = 0; j < q; j++) for (let k = 0; k <= j; k++) spread[j][k] += (d[j] * d[k]) / count;
    }
    for (let j = 0; j < q; j++) for (let k = 0; k < j; k++) spread[k][j] = spread[j][k];
    return eigen(spread).vectors;
  }

  /** Where a latent lies in the plane. */
  project(latent, from = 0) {
    return this.plane.map(({ row, offset }) => {
      if (!row) return 0.5;
      let value = offset;
      for (let j = 0; j < row.length; j++) value += row[j] * latent[from + j];
      return value;
    });
  }

  setPlane(x, y) {
    this.plane = [this.axes[x], this.axes[y]];
    const { latent, count, latents: q } = this.data;
    for (let i = 0; i < count; i++) {
      const [u, v] = this.project(latent, i * q);
      this.place[2 * i] = this.plane[0].row ? u : halton(i);
      this.place[2 * i + 1] = this.plane[1].row ? v : halton(i);
    }
    // Most of the particles; a few far away must not squeeze the others.
    const ends = [0, 1].map((axis) => {
      const [low, high] = quantiles(this.place.filter((_, n) => n % 2 === axis), [0.001, 0.999]);
      const margin = 0.12 * (high - low) || 1;
      return [low - margin, high + margin];
    });
    this.domain = ends;
    const product = (a, b) => (a.row && b.row ? sum(Array.from(a.row, (value, j) => value * b.row[j])) : +(a === b));
    this.correct = invert2(this.plane.map((a) => this.plane.map((b) => product(a, b)))); // null where both axes are the same
    this.#survey();
    const shuffledPlaces = new Float32Array(2 * count);
    this.order.forEach((i, n) => shuffledPlaces.set(this.place.subarray(2 * i, 2 * i + 2), 2 * n));
    twgl.setAttribInfoBufferFromArray(this.gl, this.buffers.attribs.position, shuffledPlaces);
    this.home();
  }

  /** Density and local mean latents on the grid. */
  #survey() {
    const { latent, count, latents: q } = this.data;
    const cells = CELLS * CELLS;
    const sums = Array.from({ length: q + 1 }, () => new Float64Array(cells));
    for (let i = 0; i < count; i++) {
      const [u, v] = this.#cell(this.place[2 * i], this.place[2 * i + 1]);
      const x = clamp(Math.floor(u), 0, CELLS - 2), y = clamp(Math.floor(v), 0, CELLS - 2);
      const fx = clamp(u - x, 0, 1), fy = clamp(v - y, 0, 1);
      for (const [n, share] of [[y * CELLS + x, (1 - fx) * (1 - fy)], [y * CELLS + x + 1, fx * (1 - fy)],
        [(y + 1) * CELLS + x, (1 - fx) * fy], [(y + 1) * CELLS + x + 1, fx * fy]]) {
        sums[q][n] += share;
        for (let j = 0; j < q; j++) sums[j][n] += share * latent[i * q + j];
      }
    }
    this.means = Array.from({ length: q + 1 }, () => new Float64Array(cells));
    let before = 0;
    let weight = 1;
    for (const blur of BLURS) {
      // Blurring goes on from the last blur: variances add up.
      for (const grid of sums) gaussianBlur(grid, Math.sqrt(blur * blur - before * before));
      before = blur;
      if (blur === BLURS[1]) this.density = Float32Array.from(sums[q]);
      this.means.forEach((grid, j) => { for (let n = 0; n < cells; n++) grid[n] += weight * sums[j][n]; });
      weight *= 1e-3;
    }
    for (let n = 0; n < cells; n++) {
      const whole = this.means[q][n];
      for (let j = 0; j < q; j++) this.means[j][n] = whole > 0 ? this.means[j][n] / whole : this.mean[j];
    }
    this.peak = this.density.reduce((a, b) => Math.max(a, b), 0) || 1;
    this.backdrop = null;
  }

  #cell(u, v) {
    return [u, v].map((value, k) => ((value - this.domain[k][0]) / (this.domain[k][1] - this.domain[k][0])) * (CELLS - 1));
  }

  #sample(grid, u, v) {
    const [x, y] = this.#cell(u, v).map((value) => clamp(value, 0, CELLS - 1.001));
    const i = Math.floor(x), j = Math.floor(y), fx = x - i, fy = y - j, n = j * CELLS + i;
    return (1 - fy) * ((1 - fx) * grid[n] + fx * grid[n + 1]) + fy * ((1 - fx) * grid[n + CELLS] + fx * grid[n + CELLS + 1]);
  }

  /** −ln of the density of particles relative to its peak: energy in kT. */
  energy(u, v) {
    const inside = [u, v].every((value, k) => value >= this.domain[k][0] && value <= this.domain[k][1]);
    return inside ? -Math.log(Math.max(this.#sample(this.density, u, v) / this.peak, 1e-9)) : Infinity;
  }

  /** The latent meant by a place in the plane: its own two numbers, and the others as the particles around it have them,
   * or as `held` has them. */
  latentAt(u, v, held = null) {
    const q = this.data.latents;
    const latent = Float64Array.from({ length: q }, (_, j) => (held ? held[j] : this.#sample(this.means[j], u, v)));
    const now = this.project(latent);
    const missing = [u - now[0], v - now[1]];
    this.plane.forEach(({ row }, a) => {
      if (!row) return;
      const share = this.correct ? this.correct[a][0] * missing[0] + this.correct[a][1] * missing[1] : a === 0 ? missing[0] : 0;
      for (let j = 0; j < q; j++) latent[j] += row[j] * share;
    });
    return latent;
  }

  /** Asks for the size of the canvas, which costs a layout, and so is done when it changes alone. */
  measure() {
    this.size = [this.over.clientWidth || 1, this.over.clientHeight || 1];
  }

  home() {
    this.centre = this.domain.map(([low, high]) => (low + high) / 2);
    this.magnification = 1;
  }

  /** CSS pixels of a place, and back. */
  toScreen(u, v) {
    const [w, h] = this.size;
    return [w / 2 + (u - this.centre[0]) * this.unit[0], h / 2 - (v - this.centre[1]) * this.unit[1]];
  }

  toPlane(x, y) {
    const [w, h] = this.size;
    return [this.centre[0] + (x - w / 2) / this.unit[0], this.centre[1] - (y - h / 2) / this.unit[1]];
  }

  get unit() {
    return this.size.map((length, k) => (this.magnification * length) / (this.domain[k][1] - this.domain[k][0]));
  }

  zoomAt(x, y, factor) {
    const [u, v] = this.toPlane(x, y);
    const before = this.magnification;
    this.magnification = clamp(before * factor, 0.5, 60);
    const share = before / this.magnification;
    this.centre = [u + (this.centre[0] - u) * share, v + (this.centre[1] - v) * share];
  }

  pan(dx, dy) {
    const unit = this.unit;
    this.centre = [this.centre[0] - dx / unit[0], this.centre[1] + dy / unit[1]];
  }

  /** Particles within a polygon of the plane. */
  within(polygon) {
    const found = [];
    for (let i = 0; i < this.data.count; i++) {
      const u = this.place[2 * i], v = this.place[2 * i + 1];
      let inside = false;
      for (let a = 0, b = polygon.length - 1; a < polygon.length; b = a++) {
        const [ua, va] = polygon[a], [ub, vb] = polygon[b];
        if (va > v !== vb > v && u < ((ub - ua) * (v - va)) / (vb - va) + ua) inside = !inside;
      }
      if (inside) found.push(i);
    }
    return found;
  }

  /** `colour(i)` gives the colour of particle i. */
  colourBy(colour) {
    this.colour = colour;
    this.refreshColours();
  }

  refreshColours() {
    const any = this.selected.includes(1);
    const strength = this.data.count > 30000 ? 150 : 205;
    this.order.forEach((i, n) => {
      const colour = this.colour(i);
      const alpha = !any ? strength : this.selected[i] ? 255 : 28;
      for (let k = 0; k < 3; k++) this.colours[4 * n + k] = colour[k];
      this.colours[4 * n + 3] = alpha;
    });
    twgl.setAttribInfoBufferFromArray(this.gl, this.buffers.attribs.colour, this.colours);
  }

  /** Density and particles. */
  draw() {
    const ratio = window.devicePixelRatio || 1;
    const [w, h] = this.size;
    for (const canvas of [this.under, this.points, this.over]) {
      const [width, height] = [Math.round(w * ratio), Math.round(h * ratio)];
      if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    }
    this.#drawDensity(ratio);
    if (!this.layers.particles) return;
    this.#drawParticles(ratio);
    const context = this.under.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.drawImage(this.points, 0, 0);
  }

  #drawParticles(ratio) {
    const { gl } = this;
    gl.viewport(0, 0, this.points.width, this.points.height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.useProgram(this.program.program);
    const scale = this.unit.map((unit, k) => (2 * unit) / this.size[k]);
    const crowd = clamp(6.2 - 0.95 * Math.log10(this.data.count), 1.6, 5);
    twgl.setBuffersAndAttributes(gl, this.program, this.buffers);
    twgl.setUniforms(this.program, {
      scale, offset: scale.map((s, k) => -s * this.centre[k]), size: ratio * crowd * clamp(this.magnification ** 0.3, 0.9, 2.2),
    });
    gl.drawArrays(gl.POINTS, 0, this.data.count);
  }

  #drawDensity(ratio) {
    const context = this.under.getContext("2d", { alpha: false });
    const { ground, density, line } = this.theme();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = css(ground);
    context.fillRect(0, 0, this.under.width, this.under.height);
    if (!this.layers.density) return;
    if (!this.backdrop || this.backdrop.theme !== String(ground)) this.backdrop = this.#makeBackdrop(ground, density, line);
    const [x0, y1] = this.toScreen(this.domain[0][0], this.domain[1][0]);
    const [x1, y0] = this.toScreen(this.domain[0][1], this.domain[1][1]);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.imageSmoothingQuality = "high";
    context.drawImage(this.backdrop.picture, x0, y0, x1 - x0, y1 - y0);
  }

  /** The density as a picture with a line at each kT, finer than the grid. */
  #makeBackdrop(ground, strong, line) {
    const fine = 5 * CELLS;
    const picture = Object.assign(document.createElement("canvas"), { width: fine, height: fine });
    const context = picture.getContext("2d");
    const image = context.createImageData(fine, fine);
    const height = new Float32Array(fine * fine);
    for (let y = 0; y < fine; y++) {
      for (let x = 0; x < fine; x++) {
        const u = this.domain[0][0] + ((x + 0.5) / fine) * (this.domain[0][1] - this.domain[0][0]);
        const v = this.domain[1][1] - ((y + 0.5) / fine) * (this.domain[1][1] - this.domain[1][0]);
        height[y * fine + x] = Math.log(Math.max(this.#sample(this.density, u, v) / this.peak, 1e-6));
      }
    }
    for (let y = 0; y < fine; y++) {
      for (let x = 0; x < fine; x++) {
        const n = y * fine + x;
        const depth = -height[n];
        const share = clamp(1 - depth / 5, 0, 1) ** 1.3;
        const colour = ground.map((value, k) => value + share * (strong[k] - value));
        // A line where a whole number of kT lies between neighbours.
        const right = x + 1 < fine ? -height[n + 1] : depth, down = y + 1 < fine ? -height[n + fine] : depth;
        const level = Math.floor(depth);
        const crossing = depth < 5.5 && (Math.floor(right) !== level || Math.floor(down) !== level);
        for (let k = 0; k < 3; k++) image.data[4 * n + k] = crossing ? 0.6 * colour[k] + 0.4 * line[k] : colour[k];
        image.data[4 * n + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    return { picture, theme: String(ground) };
  }

  /** Where the molecule is. */
  mark(latent, pinned) {
    const [x, y] = this.toScreen(...this.project(latent));
    this.marker.style.transform = `translate(${x.toFixed(1)}px, ${y.toFixed(1)}px)`;
    this.marker.classList.toggle("pinned", pinned);
  }

  /** Axes, states, the path and the lasso. */
  drawOver({ path, lasso }) {
    const context = this.over.getContext("2d");
    const ratio = window.devicePixelRatio || 1;
    const [w, h] = this.size;
    const { text, accent, ground, faint } = this.theme();
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, w, h);
    context.font = "11px system-ui, sans-serif";
    this.#drawAxes(context, w, h, faint, text);
    const total = Math.max(...this.data.weights);
    if (this.layers.states) {
      for (let m = 0; m < this.data.weights.length; m++) {
        const [x, y] = this.toScreen(...this.project(this.data.points, m * this.data.latents));
        context.beginPath();
        context.arc(x, y, 1.5 + 6 * Math.sqrt(this.data.weights[m] / total), 0, 7);
        context.lineWidth = 1.2;
        context.strokeStyle = css(text);
        context.globalAlpha = 0.55;
        context.stroke();
        context.globalAlpha = 1;
      }
      context.font = "600 12px system-ui, sans-serif";
      this.data.states.forEach((state) => {
        const [x, y] = this.toScreen(...this.project(state.latent));
        context.fillStyle = css(text);
        context.beginPath();
        context.moveTo(x, y - 5);
        context.lineTo(x + 5, y);
        context.lineTo(x, y + 5);
        context.lineTo(x - 5, y);
        context.fill();
        const left = x + 13 + context.measureText(state.name).width > w - 4; // no room to the right
        context.textAlign = left ? "right" : "left";
        outlined(context, state.name, left ? x - 13 : x + 13, y + 4, text, ground);
        context.textAlign = "left";
      });
    }
    if (path.length) {
      context.strokeStyle = css(accent);
      context.lineWidth = 2;
      context.setLineDash([6, 4]);
      context.beginPath();
      const smooth = path.length > 1 ? Array.from({ length: 24 * (path.length - 1) + 1 }, (_, n) => along(path, n / 24)) : path;
      smooth.forEach((z, n) => context[n ? "lineTo" : "moveTo"](...this.toScreen(...this.project(z))));
      context.stroke();
      context.setLineDash([]);
      path.forEach((z, n) => {
        const [x, y] = this.toScreen(...this.project(z));
        context.beginPath();
        context.arc(x, y, 8, 0, 7);
        context.fillStyle = css(accent);
        context.fill();
        context.fillStyle = "#fff";
        context.font = "700 10px system-ui, sans-serif";
        context.textAlign = "center";
        context.fillText(n + 1, x, y + 3.5);
        context.textAlign = "start";
      });
    }
    if (lasso?.length > 1) {
      context.beginPath();
      lasso.forEach((place, n) => context[n ? "lineTo" : "moveTo"](...this.toScreen(...place)));
      context.closePath();
      context.fillStyle = css(accent).replace(")", " / 0.15)");
      context.fill();
      context.strokeStyle = css(accent);
      context.lineWidth = 1.5;
      context.stroke();
    }
  }

  #drawAxes(context, w, h, faint, text) {
    const corner = [this.toPlane(0, h), this.toPlane(w, 0)];
    context.strokeStyle = css(faint);
    context.fillStyle = css(text);
    context.lineWidth = 1;
    context.globalAlpha = 0.75;
    for (const axis of [0, 1]) {
      if (!this.plane[axis].row) continue;
      const low = corner[0][axis], high = corner[1][axis];
      const step = niceStep((high - low) / Math.max(2, (axis ? h : w) / 90));
      for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) {
        const [x, y] = this.toScreen(axis ? corner[0][0] : tick, axis ? tick : corner[0][1]);
        context.beginPath();
        if (axis) { context.moveTo(0, y); context.lineTo(5, y); } else { context.moveTo(x, h); context.lineTo(x, h - 5); }
        context.stroke();
        const label = String(+tick.toPrecision(6)).replace("-", "−");
        if (axis && y > 24 && y < h - 24) context.fillText(label, 8, y + 4);
        if (!axis && x > 40 && x < w - 50) { context.textAlign = "center"; context.fillText(label, x, h - 9); context.textAlign = "start"; }
      }
    }
    context.globalAlpha = 1;
    context.font = "600 12px system-ui, sans-serif";
    context.textAlign = "right";
    context.fillText(this.plane[0].name, w - 10, h - 9);
    context.textAlign = "start";
    if (this.plane[1].row) context.fillText(this.plane[1].name, 8, 16);
  }
}

/** A smooth line through latents (Catmull and Rom); t counts from point to point. */
function along(path, t) {
  const i = clamp(Math.floor(t), 0, path.length - 2), f = t - i;
  const [a, b, c, d] = [i - 1, i, i + 1, i + 2].map((n) => path[clamp(n, 0, path.length - 1)]);
  return Float64Array.from(b, (_, j) =>
    0.5 * (2 * b[j] + (c[j] - a[j]) * f + (2 * a[j] - 5 * b[j] + 4 * c[j] - d[j]) * f * f + (3 * b[j] - a[j] - 3 * c[j] + d[j]) * f * f * f));
}

function outlined(context, label, x, y, text, ground) {
  context.lineWidth = 3;
  context.strokeStyle = css(ground);
  context.strokeText(label, x, y);
  context.fillStyle = css(text);
  context.fillText(label, x, y);
}

function niceStep(about) {
  const power = 10 ** Math.floor(Math.log10(about));
  return power * ([1, 2, 5].find((step) => step * power >= about) ?? 10);
}

function invert2([[a, b], [c, d]]) {
  const det = a * d - b * c;
  return Math.abs(det) < 1e-9 ? null : [[d / det, -b / det], [-c / det, a / det]];
}

/** An evenly spread sequence in (0, 1). */
const halton = (i) => (0.5 + (i + 1) * 0.6180339887498949) % 1;

/** The numbers below n in an order that is the same each time. */
function shuffled(n) {
  const order = Uint32Array.from({ length: n }, (_, i) => i);
  let seed = 12345;
  for (let i = n - 1; i > 0; i--) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    const j = Math.floor((seed / 2 ** 32) * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

/** A blur of a square grid in place; beyond its border there is nothing. */
function gaussianBlur(grid, sigma) {
  const kernel = Float64Array.from({ length: 2 * Math.ceil(3 * sigma) + 1 }, (_, i) => Math.exp(-0.5 * ((i - Math.ceil(3 * sigma)) / sigma) ** 2));
  const whole = sum(Array.from(kernel)), reach = (kernel.length - 1) / 2;
  const line = new Float64Array(CELLS);
  for (const [step, across] of [[1, CELLS], [CELLS, 1]]) {
    for (let row = 0; row < CELLS; row++) {
      for (let i = 0; i < CELLS; i++) line[i] = grid[row * across + i * step];
      for (let i = 0; i < CELLS; i++) {
        let value = 0;
        for (let k = Math.max(-reach, -i); k <= Math.min(reach, CELLS - 1 - i); k++) value += kernel[k + reach] * line[i + k];
        grid[row * across + i * step] = value / whole;
      }
    }
  }
}
