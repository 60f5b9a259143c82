// The molecule on its canvas: as a projection, as an isosurface, or as what differs from the consensus.

const SPRITE_VERTEX = `#version 300 es
in vec2 corner;          // of a square from −1 to 1
in vec4 gaussian;        // x, y, z, σ in Å
in float amplitude;
in vec3 colour;
uniform mat3 turn;       // to the camera
uniform vec3 middle;     // what the camera looks at, Å
uniform vec2 scale;      // clip units per Å
uniform float narrowest; // σ below which a Gaussian would fall between the pixels of the target
out vec2 place;          // in σ
out vec4 paint;
uniform vec4 fixedPaint;
uniform bool coloured;
void main() {
  float sigma = max(gaussian.w, narrowest);
  vec3 seen = turn * (gaussian.xyz - middle);
  gl_Position = vec4((seen.xy + 3.0 * sigma * corner) * scale, 0.0, 1.0);
  place = 3.0 * corner;
  float height = amplitude / (6.2831853 * sigma * sigma);
  paint = height * (coloured ? vec4(colour, 1.0) : fixedPaint);
}`;

const SPRITE_FRAGMENT = `#version 300 es
precision highp float;
in vec2 place;
in vec4 paint;
out vec4 colour;
void main() { colour = paint * exp(-0.5 * dot(place, place)); }`;

const SCREEN_VERTEX = `#version 300 es
in vec2 corner;
out vec2 place;
void main() { gl_Position = vec4(corner, 0.0, 1.0); place = 0.5 * corner + 0.5; }`;

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
    float strong = 1.0 - exp(-1.8 * gain * abs(total.r));
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
  if (n.z < 0.0) n = -n;
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
    this.detail = STEPS; // falls where frames take long
    this.gl = canvas.getContext("webgl2", { antialias: false, alpha: false });
    if (!this.gl) throw new Error("WebGL 2 is not available in this browser");
    const gl = this.gl;
    if (!gl.getExtension("EXT_color_buffer_float") && !gl.getExtension("EXT_color_buffer_half_float")) {
      throw new Error("this browser cannot add up floating-point pixels (EXT_color_buffer_float)");
    }
    this.programs = {
      sprite: twgl.createProgramInfo(gl, [SPRITE_VERTEX, SPRITE_FRAGMENT]),
      screen: twgl.createProgramInfo(gl, [SCREEN_VERTEX, SCREEN_FRAGMENT]),
      mesh: twgl.createProgramInfo(gl, [MESH_VERTEX, MESH_FRAGMENT]),
    };
    const square = { numComponents: 2, data: [-1, -1, 1, -1, -1, 1, 1, 1] };
    this.screen = twgl.createBufferInfoFromArrays(gl, { corner: square });
    this.square = square;
    this.target = twgl.createFramebufferInfo(gl, [{ internalFormat: gl.RGBA16F, minMag: gl.LINEAR, wrap: gl.CLAMP_TO_EDGE }], 8, 8);
    this.meshes = [0, 1, 2].map(() => ({ surface: new Surface(), buffers: this.#meshBuffers() }));
    this.densities = [0, 1].map(() => new Density(1));
  }

  /** Another model, seen from the broad side of a typical state of it. */
  load(decoder, consensus, typical) {
    const gl = this.gl, count = decoder.count;
    this.decoder = decoder;
    this.consensus = decoder.decode(consensus);
    this.state = { position: new Float32Array(3 * count), amplitude: new Float32Array(count), sigma: decoder.sigma };
    this.colours = new Uint8Array(3 * count);
    this.painted = null; // what the colours show now
    this.palette = Array.from({ length: decoder.parts }, (_, p) => category(p));
    this.packed = new Float32Array(4 * count);
    this.sprites = twgl.createBufferInfoFromArrays(gl, {
      corner: this.square,
      gaussian: { numComponents: 4, data: this.packed, divisor: 1, drawType: gl.DYNAMIC_DRAW },
      amplitude: { numComponents: 1, data: this.state.amplitude, divisor: 1, drawType: gl.DYNAMIC_DRAW },
      colour: { numComponents: 3, data: this.colours, normalize: true, divisor: 1, drawType: gl.DYNAMIC_DRAW },
    });
    const sorted = Float32Array.from(decoder.sigma).sort();
    this.narrow = sorted[Math.floor(0.1 * count)];
    this.typical = decoder.decode(typical);
    this.levels = new Map();
    this.flat = null;
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
    let radius = 0;
    for (let i = 0; i < amplitude.length; i++) {
      const d = [0, 1, 2].map((x) => position[3 * i + x] - this.middle[x]);
      radius = Math.max(radius, Math.hypot(...d));
      for (let x = 0; x < 3; x++) for (let y = 0; y < 3; y++) spread[x][y] += (amplitude[i] * d[x] * d[y]) / mass;
    }
    this.radius = 1.12 * radius + 3 * this.narrow;
    const { values, vectors } = eigen(spread);
    this.axes = [vectors[0], vectors[1], cross(vectors[0], vectors[1])];
    // Mass over the area of the ellipse that a projection roughly fills.
    this.column = mass / (Math.PI * 4 * Math.sqrt(values[0] * values[1]));
    this.extent = 8 * Math.sqrt(values[0] * values[1] * Math.max(values[2], this.narrow ** 2)) * 4.2; // Å³
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
    const { colours, decoder: { part, count }, state: { position }, consensus: { position: before } } = this;
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
    const width = Math.max(8, Math.round(canvas.clientWidth * fine)), height = Math.max(8, Math.round(canvas.clientHeight * fine));
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    this.#colour();
    const [x, y] = this.shift;
    this.camera = {
      turn: [0, 1, 2].flatMap((column) => this.turn.map((row) => row[column])),
      middle: this.middle.map((value, k) => value - x * this.turn[0][k] - y * this.turn[1][k]),
      scale: [(2 * this.scale) / width, (2 * this.scale) / height],
      depth: 0.45 / this.radius,
    };
    const colours = this.theme();
    const unit = (colour) => colour.map((value) => value / 255);
    this.paints = { ground: unit(colours.ground), ink: unit(colours.ink), more: unit(MORE), less: unit(LESS) };
    if (this.view === "projection") this.#project(width, height);
    else this.#surface(width, height, atRest);
  }

  #project(width, height) {
    const { gl, programs } = this;
    // A sum of Gaussians has no detail finer than the narrowest: fewer, larger pixels hold it and are enlarged.
    const pixel = Math.max(1, 0.6 * this.narrow * this.scale);
    const size = [width, height].map((length) => Math.max(8, Math.ceil(length / pixel)));
    if (this.target.width !== size[0] || this.target.height !== size[1]) {
      twgl.resizeFramebufferInfo(gl, this.target, [{ internalFormat: gl.RGBA16F, minMag: gl.LINEAR, wrap: gl.CLAMP_TO_EDGE }], ...size);
    }
    twgl.bindFramebufferInfo(gl, this.target);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.disable(gl.DEPTH_TEST);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE);
    gl.useProgram(programs.sprite.program);
    twgl.setUniforms(programs.sprite, this.camera, { narrowest: (0.6 * pixel) / this.scale });
    if (this.difference) {
      this.#sprites(this.state, { coloured: false, fixedPaint: [1, 0, 0, 1] });
      this.#sprites({ ...this.consensus, sigma: this.state.sigma }, { coloured: false, fixedPaint: [-1, 0, 0, 0] });
    } else {
      this.#sprites(this.state, { coloured: this.paint !== "plain", fixedPaint: [0, 0, 0, 1] });
    }
    twgl.bindFramebufferInfo(gl, null);
    gl.disable(gl.BLEND);
    gl.useProgram(programs.screen.program);
    twgl.setUniforms(programs.screen, this.paints, {
      sums: this.target.attachments[0],
      gain: (1.1 * this.contrast) / this.column,
      mode: this.difference ? 2 : this.paint === "plain" ? 0 : 1,
    });
    twgl.setBuffersAndAttributes(gl, programs.screen, this.screen);
    gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
  }

  #sprites({ position, amplitude, sigma }, uniforms) {
    const { gl, packed, sprites, programs } = this;
    for (let i = 0; i < sigma.length; i++) {
      packed[4 * i] = position[3 * i];
      packed[4 * i + 1] = position[3 * i + 1];
      packed[4 * i + 2] = position[3 * i + 2];
      packed[4 * i + 3] = sigma[i];
    }
    twgl.setAttribInfoBufferFromArray(gl, sprites.attribs.gaussian, packed);
    twgl.setAttribInfoBufferFromArray(gl, sprites.attribs.amplitude, amplitude);
    twgl.setAttribInfoBufferFromArray(gl, sprites.attribs.colour, this.colours);
    twgl.setUniforms(programs.sprite, uniforms);
    twgl.setBuffersAndAttributes(gl, programs.sprite, sprites);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, sigma.length);
  }

  /** Å per voxel: as fine as the Gaussians deserve, and no more voxels than there is time for. */
  #step(atRest) {
    const most = atRest ? 1.6e6 : 1e5 + (5e5 * this.detail) / STEPS;
    return Math.max((atRest ? 0.55 : 0.9) * this.narrow, Math.cbrt(this.extent / most));
  }

  /** The level that holds the chosen fraction of a typical state; the same for all states. */
  #level(step) {
    if (!this.levels.has(step)) this.levels.set(step, new Density(step).fill({ ...this.typical, sigma: this.decoder.sigma }).levels());
    return this.levels.get(step)(this.fraction);
  }

  #surface(width, height, atRest) {
    const { gl, programs, densities: [whole, changed] } = this;
    const step = this.#step(atRest), level = this.#level(step);
    whole.step = changed.step = step;
    const before = { ...this.consensus, sigma: this.state.sigma };
    gl.viewport(0, 0, width, height);
    gl.clearColor(...this.paints.ground, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.enable(gl.DEPTH_TEST);
    gl.disable(gl.BLEND);
    gl.useProgram(programs.mesh.program);
    twgl.setUniforms(programs.mesh, this.camera, this.paints);
    whole.fill(this.state);
    if (!this.difference) {
      this.#mesh(0, whole, level, this.colours, 1, 1);
      return;
    }
    const boxes = [boxOf(this.state.position, before.sigma, step), boxOf(before.position, before.sigma, step)];
    const box = [[0, 1, 2].map((x) => Math.min(boxes[0][0][x], boxes[1][0][x])), [0, 1, 2].map((x) => Math.max(boxes[0][1][x], boxes[1][1][x]))];
    changed.fill(this.state, { box });
    changed.fill(before, { keep: true, factor: -1 });
    const one = (colour) => Uint8Array.from({ length: 3 * this.decoder.count }, (_, i) => colour[i % 3]);
    this.flat ??= [one(MORE), one(LESS), one([140, 146, 156])];
    this.#mesh(1, changed, 0.6 * level, this.flat[0], 1, 1);
    this.#mesh(2, changed, 0.6 * level, this.flat[1], -1, 1);
    // The state itself as a veil: first its depth alone, so that only the nearest layer is seen.
    gl.colorMask(false, false, false, false);
    const veil = this.#mesh(0, whole, level, this.flat[2], 1, 1);
    gl.colorMask(true, true, true, true);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.depthFunc(gl.LEQUAL);
    twgl.setUniforms(programs.mesh, { opacity: 0.3 });
    gl.drawElements(gl.TRIANGLES, veil.indices, gl.UNSIGNED_INT, 0);
    gl.disable(gl.BLEND);
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

  #mesh(number, density, level, colours, sign, opacity) {
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
    twgl.setUniforms(programs.mesh, { opacity });
    if (surface.indices) gl.drawElements(gl.TRIANGLES, surface.indices, gl.UNSIGNED_INT, 0);
    return surface;
  }
}
