// The molecule on its canvas: as a projection, as an isosurface, or as what differs from the consensus.

const SCREEN_VERTEX = `#version 300 es
in vec2 corner;
uniform vec2 part;       // of the plane of sums that is seen
out vec2 place;
void main() { gl_Position = vec4(corner, 0.0, 1.0); place = 0.5 * corner * part + 0.5; }`;

// Ink on paper in the light, light on a dark ground in the dark.
const SCREEN_FRAGMENT = `#version 300 es
precision highp float;
in vec2 place;
uniform sampler2D sums;
uniform float gain;      // 1 over the column density at which ink is dense
uniform vec3 ground, ink, more, less;
uniform int mode;        // 0 ink, 1 colours, 2 differences
out vec4 colour;
void main() {
  vec4 total = texture(sums, place);
  float dense = 1.0 - exp(-gain * max(total.a, 0.0));
  vec3 paint = ink;
  if (mode == 1) paint = mix(total.rgb / max(total.a, 1e-6), ink, 0.30 * dense * dense);
  vec3 shown = mix(ground, paint, dense * (mode == 2 ? 0.28 : 1.0));
  if (mode == 2) {
    float strong = 1.0 - exp(-1.3 * gain * abs(total.r));
    shown = mix(shown, total.r > 0.0 ? more : less, strong);
  }
  colour = vec4(shown, 1.0);
}`;

const MESH_VERTEX = `#version 300 es
in vec3 position, normal;
in vec4 colour;
uniform mat3 turn;
uniform vec3 middle;
uniform vec2 scale;
uniform float depth;     // clip units per Å along the view
out vec3 facing;
out vec4 paint;
out float far;
void main() {
  vec3 seen = turn * (position - middle);
  gl_Position = vec4(seen.xy * scale, -seen.z * depth, 1.0);
  facing = turn * normal;
  paint = colour;
  far = clamp(0.5 - 0.9 * seen.z * depth, 0.0, 1.0);
}`;

const MESH_FRAGMENT = `#version 300 es
precision highp float;
in vec3 facing;
in vec4 paint;
in float far;
uniform vec3 ground;
uniform float opacity;
out vec4 colour;
void main() {
  vec3 n = normalize(facing);
  float key = max(dot(n, normalize(vec3(-0.45, 0.65, 0.75))), 0.0);
  float fill = max(dot(n, normalize(vec3(0.8, -0.2, 0.5))), 0.0);
  float shine = pow(max(dot(n, normalize(vec3(-0.25, 0.36, 1.0))), 0.0), 40.0);
  float open = paint.a;
  vec3 lit = paint.rgb * (0.34 + 0.66 * key + 0.16 * fill) * mix(0.45, 1.0, open) + 0.12 * shine * open;
  lit *= mix(0.55, 1.0, smoothstep(0.0, 0.45, n.z));                 // outlines
  lit = mix(lit, ground, 0.38 * far * far);                          // what lies behind recedes
  colour = vec4(lit, 1.0) * opacity;
}`;

const MORE = [200, 40, 30], LESS = [25, 90, 200]; // what a state has and the consensus has not, and the reverse
const STEPS = 5; // of detail while the molecule moves
const BLUR = 2.5; // Å, of differences: finer than this, they are the model's own restlessness

class Molecule {
  constructor(canvas, theme) {
    this.canvas = canvas;
    this.theme = theme;
    this.view = "surface";
    this.paint = "parts";
    this.difference = false;
    this.fraction = 0.6; // of the mass within the surface
    this.contrast = 1;
    this.zoom = 1;
    this.shift = [0, 0];
    this.measure();
    this.detail = 2; // while the molecule moves: falls where frames take long
    this.gl = canvas.getContext("webgl2", { antialias: false, alpha: false });
    if (!this.gl) throw new Error("WebGL 2 is not available in this browser");
    const gl = this.gl;
    this.programs = {
      screen: makeProgram(gl, [SCREEN_VERTEX, SCREEN_FRAGMENT]),
      mesh: makeProgram(gl, [MESH_VERTEX, MESH_FRAGMENT]),
    };
    this.screen = twgl.createBufferInfoFromArrays(gl, { corner: { numComponents: 2, data: [-1, -1, 1, -1, -1, 1, 1, 1] } });
    this.sums = twgl.createTexture(gl, { width: 1, height: 1, internalFormat: gl.RGBA16F });
    this.projection = new Projection();
    this.meshes = [0, 1, 2].map(() => ({ surface: new Surface(), buffers: this.#meshBuffers() }));
    this.densities = [0, 1].map(() => new Density(1));
  }

  /** CSS pixels; asking costs a layout. */
  measure() {
    this.size = [this.canvas.clientWidth || 1, this.canvas.clientHeight || 1];
  }

  /** CSS pixels per Å. */
  get perAngstrom() {
    return (this.zoom * Math.min(...this.size)) / (2 * this.radius);
  }

  /** Another model, seen from the broad side of a typical state of it. */
  load(decoder, consensus, typical) {
    const { count } = decoder;
    this.decoder = decoder;
    this.before = { ...decoder.decode(consensus), sigma: decoder.sigma }; // the consensus
    this.state = { position: new Float32Array(3 * count), amplitude: new Float32Array(count), sigma: decoder.sigma };
    this.colours = new Uint8Array(3 * count);
    this.painted = null; // what the colours show now
    this.palette = Array.from({ length: decoder.parts }, (_, p) => category(p));
    const sorted = Float32Array.from(decoder.sigma).sort();
    this.narrow = sorted[Math.floor(0.1 * count)];
    this.typical = { ...decoder.decode(typical), sigma: decoder.sigma };
    this.levels = new Map();
    this.flat = null;
    this.bases = new Map();
    this.#survey();
    if (!this.turn) this.face();
  }

  /** Size, middle, principal axes and density of a typical state: what view, grids and contrast follow from. */
  #survey() {
    const { position, amplitude } = this.typical;
    const mean = [0, 0, 0];
    let mass = 0;
    for (let i = 0; i < amplitude.length; i++) {
      mass += amplitude[i];
      for (let x = 0; x < 3; x++) mean[x] += amplitude[i] * position[3 * i + x];
    }
    this.middle = mean.map((value) => value / mass);
    const spread = [0, 1, 2].map(() => [0, 0, 0]);
    const distance = new Float64Array(amplitude.length);
    for (let i = 0; i < amplitude.length; i++) {
      const d = [0, 1, 2].map((x) => position[3 * i + x] - this.middle[x]);
      distance[i] = Math.hypot(...d);
      for (let x = 0; x < 3; x++) for (let y = 0; y < 3; y++) spread[x][y] += (amplitude[i] * d[x] * d[y]) / mass;
    }
    // What is seen at first: nearly all of the mass, and some room to move in.
    let inside = 0;
    const outwards = [...distance.keys()].sort((a, b) => distance[a] - distance[b]);
    const last = outwards.find((i) => (inside += amplitude[i]) > 0.97 * mass) ?? outwards.at(-1);
    this.radius = 1.2 * distance[last] + 3 * this.narrow;
    const { values, vectors } = eigen(spread);
    this.axes = [vectors[0], vectors[1], cross(vectors[0], vectors[1])];
    // Mass over the area of the ellipse that a projection roughly fills.
    this.column = mass / (Math.PI * 4 * Math.sqrt(values[0] * values[1]));
    const least = (0.02 * mass) / amplitude.length / Math.pow(2 * Math.PI * this.narrow ** 2, 1.5);
    const [low, high] = boxOf(position, this.decoder.sigma, 1, amplitude, least);
    this.extent = (high[0] - low[0]) * (high[1] - low[1]) * (high[2] - low[2]); // Å³
  }

  face() {
    this.turn = this.axes.map((row) => Array.from(row));
    this.zoom = 1;
    this.shift = [0, 0];
  }

  /** Looking down an axis of the frame of the images: "x", "y" or "z". */
  along(axis) {
    this.turn = { x: [[0, 1, 0], [0, 0, 1], [1, 0, 0]], y: [[0, 0, 1], [1, 0, 0], [0, 1, 0]], z: [[1, 0, 0], [0, 1, 0], [0, 0, 1]] }[axis];
  }

  /** Turns by angles (radians) about the horizontal, vertical and viewing axes of the screen. */
  rotate(horizontal, vertical, roll = 0) {
    const about = (i, j, angle) => {
      const c = Math.cos(angle), s = Math.sin(angle);
      const [a, b] = [this.turn[i], this.turn[j]];
      this.turn[i] = a.map((value, k) => c * value - s * b[k]);
      this.turn[j] = b.map((value, k) => s * a[k] + c * value);
    };
    about(1, 2, horizontal);
    about(2, 0, vertical);
    about(0, 1, roll);
    // Rounding would shear it in the long run.
    this.turn[0] = normalised(this.turn[0]);
    this.turn[2] = normalised(cross(this.turn[0], this.turn[1]));
    this.turn[1] = cross(this.turn[2], this.turn[0]);
  }

  /** The molecule in the state of a latent. */
  set(latent) {
    this.decoder.decode(latent, this.state.position, this.state.amplitude);
  }

  /** Colours of the Gaussians; `farthest` Å is where the scale of displacements from the consensus ends. */
  #colour() {
    const { colours, decoder: { part, count }, state: { position }, before: { position: before } } = this;
    const grey = this.theme().molecule;
    if (this.paint === "displacement") {
      for (let i = 0; i < count; i++) {
        const x = position[3 * i] - before[3 * i], y = position[3 * i + 1] - before[3 * i + 1], z = position[3 * i + 2] - before[3 * i + 2];
        const colour = tables.heat[Math.min(255, (255 * Math.sqrt(x * x + y * y + z * z)) / this.farthest) | 0];
        for (let k = 0; k < 3; k++) colours[3 * i + k] = colour[k];
      }
      this.painted = null;
      return;
    }
    const key = this.paint === "parts" ? "parts" : String(grey);
    if (this.painted === key) return;
    this.painted = key;
    for (let i = 0; i < count; i++) colours.set(this.paint === "parts" ? this.palette[part[i]] : grey, 3 * i);
  }

  /** Pixels per Å of the canvas. */
  get scale() {
    return (this.zoom * Math.min(this.canvas.width, this.canvas.height)) / (2 * this.radius);
  }

  /** Draws what is set. At rest there is time for a finer grid and for smooth edges. */
  draw(atRest) {
    const { gl, canvas } = this;
    const ratio = window.devicePixelRatio || 1;
    const fine = atRest ? Math.max(2, ratio) : Math.min(ratio, 2) * (0.5 + (0.5 * this.detail) / STEPS);
    const [width, height] = this.size.map((length) => Math.max(8, Math.round(length * fine)));
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    this.#colour();
    const [x, y] = this.shift;
    this.eye = { turn: this.turn, middle: this.middle.map((value, k) => value - x * this.turn[0][k] - y * this.turn[1][k]) };
    this.camera = {
      turn: [0, 1, 2].flatMap((column) => this.turn.map((row) => row[column])),
      middle: this.eye.middle,
      scale: [(2 * this.scale) / width, (2 * this.scale) / height],
      depth: 0.45 / this.radius,
    };
    const colours = this.theme();
    const unit = (colour) => colour.map((value) => value / 255);
    this.paints = { ground: unit(colours.ground), ink: unit(colours.ink), more: unit(MORE), less: unit(LESS) };
    if (this.view === "projection") this.#project(width, height, atRest);
    else this.#surface(width, height, atRest);
  }

  #project(width, height, atRest) {
    const { gl, programs, projection, state, colours } = this;
    // A sum of Gaussians has no detail finer than the narrowest: fewer, larger pixels hold it and are enlarged.
    const share = atRest ? 0.45 : 0.9 - (0.35 * this.detail) / STEPS;
    const blur = this.difference ? BLUR : 0;
    const pixel = Math.max(1, share * Math.hypot(this.narrow, blur) * this.scale);
    const size = [width, height].map((length) => Math.max(8, Math.ceil(length / pixel)));
    projection.begin(...size);
    const paint = (weights) => (_, out) => out.set(weights);
    const add = (gaussians, weigh) => projection.add(gaussians, this.eye, this.scale / pixel, weigh, blur);
    if (this.difference) {
      add(state, paint([1, 0, 0, 1]));
      add(this.before, paint([-1, 0, 0, 0]));
    } else {
      add(state, (i, out) => {
        for (let k = 0; k < 3; k++) out[k] = colours[3 * i + k] / 255;
        out[3] = 1;
      });
    }
    twgl.setTextureFromArray(gl, this.sums, projection.sums, {
      width: size[0], height: size[1], internalFormat: gl.RGBA16F, format: gl.RGBA, type: gl.FLOAT, minMag: gl.LINEAR, wrap: gl.CLAMP_TO_EDGE,
    });
    gl.disable(gl.DEPTH_TEST);
    gl.disable(gl.CULL_FACE);
    gl.disable(gl.BLEND);
    gl.viewport(0, 0, width, height);
    gl.useProgram(programs.screen.program);
    twgl.setBuffersAndAttributes(gl, programs.screen, this.screen);
    const mode = this.difference ? 2 : this.paint === "plain" ? 0 : 1;
    // The plane of sums is a little larger than the canvas where lengths do not divide.
    const part = [width, height].map((length, k) => length / pixel / size[k]);
    twgl.setUniforms(programs.screen, this.paints, { sums: this.sums, part, gain: (1.1 * this.contrast) / this.column, mode });
    gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
  }

  /** Å per voxel: as fine as the Gaussians deserve, and no more voxels than there is time for. */
  #step(atRest) {
    const most = atRest ? 4e6 : 1.4e5 * 11 ** (this.detail / STEPS);
    return Math.max((atRest ? 0.8 : 0.9) * this.narrow, Math.cbrt(this.extent / most));
  }

  /** The level that holds the chosen fraction of a typical state; the same for all states. */
  #level(step, blur = 0) {
    const key = `${step} ${blur}`;
    if (!this.levels.has(key)) this.levels.set(key, new Density(step).fill(this.typical, { blur }).levels());
    return this.levels.get(key)(this.fraction);
  }

  #surface(width, height, atRest) {
    const { gl, programs, densities: [whole, changed] } = this;
    const fine = this.#step(atRest);
    gl.viewport(0, 0, width, height);
    gl.clearColor(...this.paints.ground, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.enable(gl.DEPTH_TEST);
    gl.enable(gl.CULL_FACE); // in software, triangles are what costs time
    gl.disable(gl.BLEND);
    gl.useProgram(programs.mesh.program);
    twgl.setUniforms(programs.mesh, this.camera, this.paints);
    if (!this.difference) {
      const level = this.#level(fine);
      whole.step = fine;
      this.#mesh(0, whole.fill(this.state, { least: 0.01 * level }), level, this.colours);
      return;
    }
    whole.step = Math.max(fine, 0.8 * Math.hypot(this.narrow, BLUR));
    const level = this.#level(whole.step, BLUR), least = 0.01 * level;
    const before = this.#consensusAround(whole.step, least);
    whole.fill(this.state, { least, blur: BLUR, box: before.box });
    changed.subtract(whole, before);
    const one = (colour) => Uint8Array.from({ length: 3 * this.decoder.count }, (_, i) => colour[i % 3]);
    this.flat ??= [one(MORE), one(LESS), one([140, 146, 156])];
    this.#mesh(1, changed, 0.5 * level, this.flat[0]);
    this.#mesh(2, changed, 0.5 * level, this.flat[1], -1);
    // The state itself as a veil: first its depth alone, so that only the nearest layer is seen.
    gl.colorMask(false, false, false, false);
    const veil = this.#mesh(0, whole, level, this.flat[2]);
    gl.colorMask(true, true, true, true);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.depthFunc(gl.LEQUAL);
    twgl.setUniforms(programs.mesh, { opacity: 0.36 });
    if (veil.indices) gl.drawElements(gl.TRIANGLES, veil.indices, gl.UNSIGNED_INT, 0);
    gl.disable(gl.BLEND);
  }

  /** The consensus in a box that holds the state as well; it is made again only where that grows. */
  #consensusAround(step, least) {
    const { position, amplitude, sigma } = this.state;
    const box = boxOf(position, sigma, step, amplitude, least, BLUR);
    const kept = this.bases.get(step);
    if (kept && box[0].every((low, x) => low >= kept.box[0][x]) && box[1].every((high, x) => high <= kept.box[1][x])) return kept;
    const own = boxOf(this.before.position, sigma, step, this.before.amplitude, least, BLUR);
    const base = new Density(step).fill(this.before, { box: union(union(own, box), kept ? kept.box : own), blur: BLUR });
    this.bases.set(step, base);
    return base;
  }

  #meshBuffers() {
    const { gl } = this;
    return twgl.createBufferInfoFromArrays(gl, {
      position: { numComponents: 3, data: new Float32Array(3), drawType: gl.DYNAMIC_DRAW },
      normal: { numComponents: 3, data: new Float32Array(3), drawType: gl.DYNAMIC_DRAW },
      colour: { numComponents: 4, data: new Uint8Array(4), normalize: true, drawType: gl.DYNAMIC_DRAW },
      indices: { data: new Uint32Array(3), drawType: gl.DYNAMIC_DRAW },
    });
  }

  #mesh(number, density, level, colours, sign = 1) {
    const { gl, programs } = this;
    const { surface, buffers } = this.meshes[number];
    surface.extract(density, level, colours, sign);
    const send = (buffer, kind, values) => {
      gl.bindBuffer(kind, buffer);
      gl.bufferData(kind, values, gl.DYNAMIC_DRAW);
    };
    gl.bindVertexArray(null);
    send(buffers.attribs.position.buffer, gl.ARRAY_BUFFER, surface.position.subarray(0, 3 * surface.vertices));
    send(buffers.attribs.normal.buffer, gl.ARRAY_BUFFER, surface.normal.subarray(0, 3 * surface.vertices));
    send(buffers.attribs.colour.buffer, gl.ARRAY_BUFFER, surface.colour.subarray(0, 4 * surface.vertices));
    send(buffers.indices, gl.ELEMENT_ARRAY_BUFFER, surface.triangles.subarray(0, surface.indices));
    twgl.setBuffersAndAttributes(gl, programs.mesh, buffers);
    twgl.setUniforms(programs.mesh, { opacity: 1 });
    if (surface.indices) gl.drawElements(gl.TRIANGLES, surface.indices, gl.UNSIGNED_INT, 0);
    return surface;
  }
}
