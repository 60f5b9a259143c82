// The page: what the user does, what follows, and one loop that draws what has changed.

const byId = (id) => document.getElementById(id);
const REST = 220; // ms without a change after which there is time for the fine picture
const STRETCH = 1.6; // seconds from point to point of a path at speed 1

function readNumbers() {
  const raw = JSON.parse(byId("numbers").textContent);
  const { particles } = raw;
  const columns = Object.fromEntries(Object.entries(particles).map(([name, packed]) => [name, unpack(packed)]));
  const [count, latents] = particles.latent.shape;
  return {
    name: raw.name, count, latents, ...columns,
    decoders: raw.decoders.map((packed) => new Decoder(packed)),
    points: unpack(raw.points), weights: unpack(raw.weights), consensus: Float64Array.from(raw.consensus),
    principal: raw.principal && raw.principal.map((row) => Float64Array.from(row)), states: raw.states,
  };
}

/** Light or dark as the system has it, until the user chooses; and the colours of canvases, which know no CSS. */
const theme = (() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const COLOURS = {
    light: { ground: [252, 252, 253], ink: [27, 31, 36], text: [27, 31, 36], faint: [120, 130, 142], accent: [213, 94, 0],
      density: [176, 196, 214], line: [70, 95, 120], molecule: [127, 168, 201] },
    dark: { ground: [15, 18, 22], ink: [236, 239, 243], text: [230, 233, 237], faint: [120, 130, 142], accent: [255, 152, 56],
      density: [52, 82, 112], line: [150, 185, 215], molecule: [127, 168, 201] },
  };
  const apply = (name) => { root.dataset.theme = name; };
  apply(dark.matches ? "dark" : "light");
  const now = () => COLOURS[root.dataset.theme];
  now.flip = () => apply(root.dataset.theme === "dark" ? "light" : "dark");
  now.follow = (changed) => dark.addEventListener("change", () => { apply(dark.matches ? "dark" : "light"); changed(); });
  return now;
})();

function start() {
  const data = readNumbers();
  const plane = new LatentPlane(byId("plane"), data, theme);
  const molecule = new Molecule(byId("molecule").querySelector("canvas"), theme);

  // What the page is at the moment. `latent` is what the molecule shows.
  let latent = startLatent(data);
  let decoder, motions;
  let pinned = false;
  let tool = "move";
  let path = [], route = [], playing = false, time = 0;
  let lasso = null;
  let pointer = null; // where it was last seen over the plane, CSS pixels
  let moved = false; // the pointer, since the last frame
  const stale = { plane: true, over: true, molecule: true, words: true };
  const touch = (...names) => names.forEach((name) => { stale[name] = true; });

  function goTo(next) {
    latent = Float64Array.from(next);
    touch("molecule", "words");
  }

  function release() {
    pinned = playing = false;
    showPlaying();
  }

  // ---- the model
  function useDecoder(index) {
    decoder = data.decoders[index];
    molecule.load(decoder, data.consensus, startLatent(data));
    motions = new Motions(decoder, data.consensus);
    const { farthest, liveliest } = travel(decoder, data);
    molecule.farthest = farthest;
    fill(byId("motion-part"), range(decoder.parts).map((p) => [p, `part ${p + 1}`]));
    fill(byId("motion-against"), [["", "the images’ frame"], ...range(decoder.parts).map((p) => [p, `part ${p + 1}`])]);
    byId("motion-part").value = liveliest;
    touch("molecule", "words");
    paintParticles();
    showMoleculeLegend();
  }

  // ---- colours of particles
  const columnColours = {
    gain: ["gain, nats", "viridis"], defocus: ["defocus, µm", "viridis"], micrograph: ["micrograph", "viridis"], grey: ["grey scale", "viridis"],
  };
  let work = null; // motions that are still being computed

  function paintParticles() {
    const by = byId("particle-colour").value;
    byId("motion-of").hidden = by !== "turn" && by !== "shift";
    work = null;
    if (by === "population") {
      const energy = Float32Array.from({ length: data.count }, (_, i) => plane.energy(plane.place[2 * i], plane.place[2 * i + 1]));
      ramp(energy, "heat", "kT below the peak", [6, 0], (value) => shown(value, 2));
    } else if (by === "half") {
      swatches([...new Set(data.half)].sort(), (half) => `half ${half}`, (half) => category(half === 2 ? 5 : 0), (i) => data.half[i]);
    } else if (by === "cluster") {
      swatches([...new Set(data.cluster)].sort((a, b) => a - b), (k) => `class ${k}`, category, (i) => data.cluster[i]);
    } else if (by === "state") {
      const near = nearestStates();
      swatches(range(data.states.length), (k) => data.states[k].name, category, (i) => near[i]);
    } else if (by === "turn" || by === "shift") {
      work = motionsOfAll(by);
      byId("plane-legend").textContent = "computing motions";
    } else if (by in columnColours) {
      const [label, map] = columnColours[by];
      const values = by === "defocus" ? data.defocus.map((value) => value / 1e4) : data[by];
      ramp(values, map, label, quantiles(values, by === "micrograph" ? [0, 1] : [0.01, 0.99]));
    } else {
      plane.colourBy(() => theme().molecule);
      byId("plane-legend").replaceChildren();
    }
    touch("plane");
  }

  function ramp(values, map, label, [low, high], say = shown) {
    const table = tables[map], span = high - low || 1;
    plane.colourBy((i) => table[clamp(Math.round((255 * (values[i] - low)) / span), 0, 255)]);
    byId("plane-legend").replaceChildren(rampLegend(map, label, say(low), say(high)));
  }

  function swatches(keys, name, colour, keyOf) {
    const colours = new Map(keys.map((key) => [key, colour(key)]));
    plane.colourBy((i) => colours.get(keyOf(i)));
    byId("plane-legend").replaceChildren(swatchLegend(keys.slice(0, 14).map((key) => [colour(key), name(key)])));
  }

  let nearCache = null;
  const nearestStates = () => (nearCache ??= Uint16Array.from({ length: data.count }, (_, i) => nearestState(data.latent, i * data.latents)));

  function nearestState(values, from = 0) {
    let best = 0, least = Infinity;
    data.states.forEach((state, k) => {
      let distance = 0;
      for (let j = 0; j < data.latents; j++) distance += (values[from + j] - state.latent[j]) ** 2;
      if (distance < least) [least, best] = [distance, k];
    });
    return best;
  }

  /** Turn or shift of a part for every particle, some at a time, so that the page stays alive. */
  function* motionsOfAll(kind) {
    const part = Number(byId("motion-part").value), against = byId("motion-against").value;
    const quaternions = new Float32Array(4 * data.count), shifts = new Float32Array(data.count);
    const one = new Float64Array(data.latents);
    plane.colourBy(() => theme().molecule);
    for (let i = 0; i < data.count; i++) {
      for (let j = 0; j < data.latents; j++) one[j] = data.latent[i * data.latents + j];
      const { rotation, shift } = motionAgainst(decoder.numbers(one), part, against);
      quaternions.set(rotation, 4 * i);
      shifts[i] = Math.hypot(...shift);
      if (i % 64 === 63) yield i / data.count;
    }
    if (kind === "shift") {
      ramp(shifts, "viridis", `shift of part ${part + 1}, Å`, [0, quantiles(shifts, [0.99])[0]]);
    } else {
      const { angles, widest } = signedTurns(quaternions);
      const end = widest > 120 ? 180 : widest;
      ramp(angles, widest > 120 ? "cyclic" : "heat", `turn of part ${part + 1} about its main axis`, [-end, end], (value) => `${shown(value, 2)}°`);
    }
    touch("plane");
  }

  /** The motion of a part from the consensus, as seen from another part if one is named. */
  function motionAgainst(numbers, part, against) {
    const own = motions.of(part, numbers);
    if (against === "") return own;
    const other = motions.of(Number(against), numbers);
    const seen = back(other.rotation);
    const apart = [0, 1, 2].map((x) => motions.centre[3 * part + x] - motions.centre[3 * against + x]);
    const now = rotated(seen, apart.map((value, x) => value + own.shift[x] - other.shift[x]));
    return { rotation: turned(seen, own.rotation), shift: now.map((value, x) => value - apart[x]) };
  }

  // ---- words beside the pictures
  function showHere() {
    const [u, v] = plane.project(latent);
    const energy = plane.energy(u, v);
    const lines = [];
    if (data.states.length) {
      const state = data.states[nearestState(latent)];
      lines.push(["number", state.name]);
      lines.push(["", describe(state)]);
    }
    const few = !(energy < 7);
    lines.push([few ? "far" : "", few ? "No particles here: the decoder extrapolates." : `${shown(energy, 2)} kT below the peak of the density.`]);
    if (pinned) lines.push(["", "Held; click again to let go."]);
    byId("here").replaceChildren(...lines.map(([look, text]) => element(look === "number" ? "div" : "p", { className: look, textContent: text })));
    const numbers = decoder.numbers(latent);
    range(decoder.parts).forEach((p) => {
      const { rotation, shift } = motions.of(p, numbers);
      const cells = byId("parts").tBodies[0].rows[p].cells;
      cells[2].textContent = `${Math.round((2 * Math.acos(Math.min(1, rotation[0])) * 180) / Math.PI)}°`;
      cells[3].textContent = `${shown(Math.hypot(...shift), 2)} Å`;
    });
    sliders.forEach(({ input, output }, j) => {
      if (document.activeElement !== input || playing) input.value = latent[j];
      output.textContent = latent[j].toFixed(2).replace("-", "−");
    });
    if (data.states.length) {
      const near = nearestState(latent);
      [...byId("states").tBodies[0].rows].forEach((row, k) => row.classList.toggle("near", k === near));
    }
  }

  function showTip() {
    const tip = byId("tip");
    tip.hidden = !pointer || tool === "lasso" || !data.states.length;
    if (tip.hidden) return;
    const there = plane.latentAt(...plane.toPlane(...pointer), byId("hold").checked ? latent : null);
    const state = data.states[nearestState(there)];
    tip.replaceChildren(element("b", { textContent: state.name }), element("div", { textContent: describe(state) }));
    const [w, h] = plane.size;
    const x = pointer[0] + 18 + tip.offsetWidth > w ? pointer[0] - 14 - tip.offsetWidth : pointer[0] + 18;
    const y = clamp(pointer[1] + 14, 4, h - tip.offsetHeight - 4);
    tip.style.transform = `translate(${Math.round(x)}px, ${Math.round(y)}px)`;
  }

  function showMoleculeLegend() {
    const legend = byId("molecule-legend");
    if (molecule.difference) {
      legend.replaceChildren(swatchLegend([[MORE, "more than the consensus"], [LESS, "less"]]));
    } else if (molecule.paint === "displacement") {
      legend.replaceChildren(rampLegend("heat", "from the consensus, Å", "0", shown(molecule.farthest, 2)));
    } else if (molecule.paint === "parts") {
      legend.replaceChildren(swatchLegend(molecule.palette.map((colour, p) => [colour, String(p + 1)])));
    } else legend.replaceChildren();
    byId("gaussian-colour").disabled = molecule.difference;
    const projecting = molecule.view === "projection";
    byId("level-name").textContent = projecting ? "contrast" : "mass inside";
    byId("level").value = projecting ? (Math.log2(molecule.contrast) + 3) / 6 : molecule.fraction;
    byId("level-value").textContent = projecting ? `× ${shown(molecule.contrast, 2)}` : `${Math.round(100 * molecule.fraction)} %`;
  }

  function showScale() {
    const length = niceStep(70 / molecule.perAngstrom);
    const shownNow = `${length} Å, ${length * molecule.perAngstrom}`;
    if (shownNow === scaleShown) return;
    scaleShown = shownNow;
    byId("scale").style.width = `${length * molecule.perAngstrom}px`;
    byId("scale").textContent = `${length} Å`;
  }
  let scaleShown = "";

  function showSelection() {
    const count = sum(Array.from(plane.selected));
    byId("selection-note").textContent = count
      ? `${count.toLocaleString("en")} of ${data.count.toLocaleString("en")} particles (${shown((100 * count) / data.count, 3)} %).`
      : "None. Draw around particles with the lasso, or take those nearest to a state in the table of states.";
    for (const id of ["save-rows", "save-table", "go-mean", "clear-selection"]) byId(id).disabled = !count;
    plane.refreshColours();
    touch("plane", "over");
  }

  function showPlaying() {
    byId("play").textContent = playing ? "Pause" : "Play";
    byId("undo").disabled = byId("clear-path").disabled = !path.length;
    route = routeOf();
    const own = "Choose Path and click in the plane for your own.";
    byId("path-note").textContent = path.length > 1 ? `${path.length} points, there and back.`
      : path.length === 1 ? "One point; add another."
        : data.states.length > 1 ? `No points: through the states in their order. ${own}` : `No points: along the first component. ${own}`;
    byId("time").max = route.length - 1;
  }

  /** What is played: the points of the user; without any the states, or the first component. */
  function routeOf() {
    if (path.length > 1) return path;
    if (data.states.length > 1) return data.states.map((state) => Float64Array.from(state.latent));
    const first = data.latent.filter((_, n) => n % data.latents === 0);
    const column = plane.axes[0];
    return quantiles(first, [0.02, 0.25, 0.5, 0.75, 0.98]).map((value) => latentAlong(column, value));
  }

  function latentAlong(axis, value) {
    const before = plane.project(data.consensus);
    if (plane.plane[0] === axis) return plane.latentAt(value, before[1]);
    return Float64Array.from(data.consensus, (own, j) => own + axis.row[j] * (value - data.consensus[0]));
  }

  // ---- the loop
  let last = performance.now(), lastChange = 0, resting = false;
  let contentUntil = 0;
  const frames = []; // when the molecule was drawn while it moved
  const counts = { frames: 0, molecule: 0 };

  function frame(now) {
    const passed = Math.min(0.1, (now - last) / 1000);
    last = now;
    counts.frames++;
    if (playing) {
      const whole = route.length - 1;
      time = (time + (passed * Number(byId("speed").value)) / STRETCH) % (2 * whole);
      const played = time <= whole ? time : 2 * whole - time;
      goTo(along(route, played));
      if (counts.frames % 4 === 0) byId("time").value = played;
    } else if (moved && pointer && tool === "move" && !pinned) {
      goTo(plane.latentAt(...plane.toPlane(...pointer), byId("hold").checked ? latent : null));
    }
    if (moved) showTip();
    moved = false;
    if (stale.plane) plane.draw();
    if (stale.plane || stale.over) plane.drawOver({ path, lasso });
    if (stale.plane || stale.words) plane.mark(latent, pinned);
    if (stale.molecule) {
      molecule.set(latent);
      molecule.draw(false);
      showScale();
      counts.molecule++;
      frames.push(now);
      lastChange = now;
      resting = false;
      keepPace(now);
    } else if (!resting && now - lastChange > REST) {
      molecule.draw(true);
      resting = true;
      frames.length = 0;
      byId("rate").textContent = "";
    }
    if (stale.words && (counts.frames % 6 === 0 || !stale.molecule)) {
      showHere();
      stale.words = false;
    }
    stale.plane = stale.over = stale.molecule = false;
    const until = performance.now() + 7;
    while (work && performance.now() < until) {
      const step = work.next();
      if (step.done) work = null;
      else byId("plane-legend").textContent = `computing motions, ${Math.round(100 * step.value)} %`;
    }
    requestAnimationFrame(frame);
  }

  /** Less detail where frames come slowly, more where there is time. */
  function keepPace(now) {
    if (frames.length > 30) frames.shift();
    if (frames.length < 5) return;
    const rate = (1000 * (frames.length - 1)) / (now - frames[0]);
    if (counts.molecule % 5) return;
    byId("rate").textContent = `${Math.round(rate)} frames/s`;
    const recent = (now - frames[frames.length - 5]) / 4;
    if (recent > 28) {
      molecule.detail = Math.max(0, molecule.detail - 1);
      contentUntil = now + 6000; // no trying again at once, which would flicker
    } else if (recent < 19 && now > contentUntil) molecule.detail = Math.min(STEPS, molecule.detail + 1);
  }

  // ---- the plane under the pointer
  const stage = byId("plane");
  const placeOf = (event) => {
    const box = stage.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  let pressed = null; // where a drag began
  stage.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    stage.setPointerCapture(event.pointerId);
    pressed = { at: placeOf(event), far: false };
    pointer = placeOf(event);
    if (tool === "lasso") lasso = [plane.toPlane(...pointer)];
  });
  stage.addEventListener("pointermove", (event) => {
    const before = pointer;
    pointer = placeOf(event);
    moved = true;
    if (!pressed) return;
    pressed.far ||= Math.hypot(pointer[0] - pressed.at[0], pointer[1] - pressed.at[1]) > 4;
    if (tool === "lasso") {
      lasso.push(plane.toPlane(...pointer));
      touch("over");
    } else if (pressed.far && before && event.pointerType === "mouse") {
      plane.pan(pointer[0] - before[0], pointer[1] - before[1]);
      touch("plane");
    }
  });
  stage.addEventListener("pointerup", (event) => {
    if (!pressed) return;
    const place = plane.toPlane(...placeOf(event));
    if (tool === "lasso") {
      if (lasso.length > 2) select(plane.within(lasso), event);
      lasso = null;
    } else if (!pressed.far) {
      const there = plane.latentAt(...place, byId("hold").checked ? latent : null);
      if (tool === "path") addPoint(there);
      else {
        playing = false;
        showPlaying();
        pinned = !pinned;
        goTo(there);
      }
    }
    pressed = null;
    touch("over", "words");
  });
  stage.addEventListener("pointercancel", () => {
    pressed = lasso = null;
    touch("over");
  });
  stage.addEventListener("pointerleave", () => {
    pointer = null;
    moved = true;
  });
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    plane.zoomAt(...placeOf(event), Math.exp(-0.0015 * event.deltaY));
    touch("plane");
  }, { passive: false });
  stage.addEventListener("keydown", (event) => {
    const step = (event.shiftKey ? 0.05 : 0.012);
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    if (event.key in ways) {
      release();
      const here = plane.project(latent);
      const next = here.map((value, k) => value + ways[event.key][k] * step * (plane.domain[k][1] - plane.domain[k][0]));
      goTo(plane.latentAt(...next, byId("hold").checked ? latent : null));
      pinned = true;
    } else if (event.key === "Enter") {
      if (tool === "path") addPoint(latent);
      else pinned = !pinned;
    } else if (event.key === "+" || event.key === "-") {
      plane.zoomAt(...plane.toScreen(...plane.project(latent)), event.key === "+" ? 1.25 : 0.8);
    } else return;
    event.preventDefault();
    touch("plane", "over", "words");
  });

  function addPoint(there) {
    path = [...path, Float64Array.from(there)];
    goTo(there);
    showPlaying();
  }

  function select(found, { shiftKey = false, altKey = false } = {}) {
    if (!shiftKey && !altKey) plane.selected.fill(0);
    for (const i of found) plane.selected[i] = altKey ? 0 : 1;
    showSelection();
  }

  // ---- the molecule under the pointer
  const canvas = byId("molecule");
  let held = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    held = [event.clientX, event.clientY];
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!held) return;
    const [dx, dy] = [event.clientX - held[0], event.clientY - held[1]];
    held = [event.clientX, event.clientY];
    if (event.shiftKey || event.buttons === 4 || event.buttons === 2) {
      molecule.shift[0] += dx / molecule.perAngstrom;
      molecule.shift[1] -= dy / molecule.perAngstrom;
    } else molecule.rotate(0.009 * dy, 0.009 * dx);
    touch("molecule");
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { held = null; });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    magnify(Math.exp(-0.0012 * event.deltaY));
  }, { passive: false });
  canvas.addEventListener("dblclick", () => {
    molecule.face();
    touch("molecule");
  });
  canvas.addEventListener("keydown", (event) => {
    const turns = { ArrowLeft: [0, -0.1], ArrowRight: [0, 0.1], ArrowUp: [-0.1, 0], ArrowDown: [0.1, 0], "<": [0, 0, 0.1], ">": [0, 0, -0.1] };
    if (event.key in turns) molecule.rotate(...turns[event.key]);
    else if (event.key === "+" || event.key === "-") magnify(event.key === "+" ? 1.15 : 0.87);
    else return;
    event.preventDefault();
    touch("molecule");
  });

  function magnify(factor) {
    molecule.zoom = clamp(molecule.zoom * factor, 0.3, 20);
    touch("molecule");
  }

  // ---- controls
  const changed = (id, then, event = "change") => byId(id).addEventListener(event, then);
  const clicked = (id, then) => byId(id).addEventListener("click", then);

  function choice(id, then) {
    const buttons = [...byId(id).querySelectorAll("button")];
    const choose = (value) => {
      buttons.forEach((button) => button.setAttribute("aria-pressed", button.dataset.value === value));
      then(value);
    };
    buttons.forEach((button) => button.addEventListener("click", () => choose(button.dataset.value)));
    return choose;
  }
  const chooseTool = choice("tool", (value) => {
    tool = value;
    lasso = null;
    touch("over");
  });
  const chooseView = choice("view", (value) => {
    molecule.view = value;
    showMoleculeLegend();
    touch("molecule");
  });
  byId("direction").addEventListener("click", ({ target }) => {
    if (target.dataset.value === "face") molecule.face();
    else if (target.dataset.value) molecule.along(target.dataset.value);
    touch("molecule");
  });

  function changePlane() {
    plane.setPlane(Number(byId("axis-x").value), Number(byId("axis-y").value));
    if (byId("particle-colour").value === "population") paintParticles();
    touch("plane", "over", "words");
  }
  changed("axis-x", changePlane);
  changed("axis-y", changePlane);
  for (const id of ["particle-colour", "motion-part", "motion-against"]) changed(id, paintParticles);
  for (const [id, layer] of [["show-particles", "particles"], ["show-density", "density"], ["show-states", "states"]]) {
    changed(id, ({ target }) => {
      plane.layers[layer] = target.checked;
      touch("plane");
    });
  }
  clicked("plane-home", () => {
    plane.home();
    touch("plane");
  });
  changed("gaussian-colour", ({ target }) => {
    molecule.paint = target.value;
    showMoleculeLegend();
    touch("molecule");
  });
  changed("difference", ({ target }) => {
    molecule.difference = target.checked;
    showMoleculeLegend();
    touch("molecule");
  });
  changed("half", ({ target }) => useDecoder(Number(target.value)));
  changed("level", ({ target }) => {
    if (molecule.view === "projection") molecule.contrast = 2 ** (6 * target.value - 3);
    else molecule.fraction = clamp(Number(target.value), 0.02, 0.995);
    showMoleculeLegend();
    touch("molecule");
  }, "input");
  clicked("play", togglePlay);
  changed("time", ({ target }) => {
    playing = false;
    pinned = true;
    time = Number(target.value);
    goTo(along(route, time));
    showPlaying();
  }, "input");
  clicked("add", () => addPoint(latent));
  clicked("undo", () => {
    path = path.slice(0, -1);
    time = 0;
    showPlaying();
    touch("over");
  });
  clicked("clear-path", clearPath);
  clicked("clear-selection", () => select([]));
  clicked("invert", () => {
    plane.selected.forEach((value, i) => { plane.selected[i] = 1 - value; });
    showSelection();
  });
  clicked("go-mean", () => {
    const mean = new Float64Array(data.latents);
    const rows = selection();
    for (const i of rows) for (let j = 0; j < data.latents; j++) mean[j] += data.latent[i * data.latents + j] / rows.length;
    release();
    pinned = true;
    goTo(mean);
  });
  clicked("save-rows", () => save("rows.txt", rowsText()));
  clicked("save-table", () => save("particles.csv", tableText()));
  clicked("reset", reset);
  clicked("theme", flipTheme);
  clicked("help", toggleHelp);

  function togglePlay() {
    playing = !playing;
    if (playing) pinned = false;
    showPlaying();
  }

  function clearPath() {
    path = [];
    playing = false;
    time = 0;
    showPlaying();
    touch("over");
  }

  function reset() {
    release();
    clearPath();
    select([]);
    molecule.face();
    Object.assign(molecule, { fraction: 0.6, contrast: 1, difference: false, paint: "parts" });
    byId("difference").checked = byId("hold").checked = false;
    byId("gaussian-colour").value = "parts";
    plane.home();
    chooseTool("move");
    chooseView("surface");
    goTo(startLatent(data));
    touch("plane");
  }

  function flipTheme() {
    theme.flip();
    themeChanged();
  }

  function themeChanged() {
    plane.refreshColours();
    drawHistograms();
    touch("plane", "molecule");
  }

  function toggleHelp() {
    byId("keys").hidden = !byId("keys").hidden;
    byId("help").setAttribute("aria-expanded", !byId("keys").hidden);
    touch("plane", "molecule");
  }

  const keys = {
    m: () => chooseTool("move"), p: () => chooseTool("path"), l: () => chooseTool("lasso"), " ": togglePlay, r: reset, t: flipTheme, "?": toggleHelp,
    c: () => { release(); pinned = true; goTo(data.consensus); },
    d: () => byId("difference").click(),
    v: () => chooseView(molecule.view === "surface" ? "projection" : "surface"),
    Escape: () => { lasso = null; release(); clearPath(); select([]); },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT)$/.test(event.target.tagName), onButton = event.target.tagName === "BUTTON";
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act || typing || (onButton && event.key === " ")) return;
    event.preventDefault();
    act();
  });

  // ---- what the selection is saved as
  const selection = () => Array.from(data.row.keys()).filter((i) => plane.selected[i]);
  // With a head, as latents.csv: these rows count from 1, bare numbers in such files from 0.
  const whichRow = (i) => (data.copy ? `${data.row[i]},${data.copy[i]}` : `${data.row[i]}`);
  const rowsText = () => [data.copy ? "row,copy" : "row", ...selection().map(whichRow), ""].join("\n");

  function tableText() {
    const names = ["row", ...(data.copy ? ["copy"] : []), "half", ...range(data.latents).map((j) => `z${j + 1}`), ...(data.cluster ? ["class"] : []), "gain"];
    const lines = selection().map((i) => [
      whichRow(i), data.half[i], ...range(data.latents).map((j) => data.latent[i * data.latents + j].toFixed(4)),
      ...(data.cluster ? [data.cluster[i] + 1] : []), data.gain[i].toFixed(4),
    ].join(","));
    return [names.join(","), ...lines, ""].join("\n");
  }

  function save(name, text) {
    const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: "text/plain" })) });
    link.download = `${data.name.replace(/[^\w.-]+/g, "_")}_${name}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // ---- tables and sliders
  const sliders = range(data.latents).map((j) => {
    const column = Float32Array.from({ length: data.count }, (_, i) => data.latent[i * data.latents + j]);
    const [low, high] = quantiles(column, [0.001, 0.999]);
    const margin = 0.08 * (high - low) || 1;
    const input = element("input", { type: "range", id: `slider-${j + 1}`, min: low - margin, max: high + margin, step: (high - low) / 500 || 0.01 });
    const output = element("output", {}), histogram = element("canvas", {});
    const label = element("label", { textContent: `z${j + 1}`, htmlFor: input.id });
    const track = element("div", { className: "track" }, histogram, input);
    byId("components").append(element("div", { className: "component" }, label, track, output));
    input.addEventListener("input", () => {
      release();
      pinned = true;
      goTo(latent.map((value, k) => (k === j ? Number(input.value) : value)));
    });
    return { input, output, histogram, column, low: low - margin, high: high + margin };
  });

  function drawHistograms() {
    const { faint } = theme();
    for (const { histogram, column, low, high } of sliders) {
      const bins = new Float64Array(60);
      for (const value of column) {
        const bin = Math.floor((60 * (value - low)) / (high - low));
        if (bin >= 0 && bin < 60) bins[bin]++;
      }
      const most = Math.max(...bins);
      [histogram.width, histogram.height] = [240, 40];
      const context = histogram.getContext("2d");
      context.fillStyle = css(faint);
      bins.forEach((count, bin) => context.fillRect(8 + 3.73 * bin, 34 - (32 * count) / most, 3.9, (32 * count) / most));
    }
  }

  function buildTables() {
    const whole = sum(Array.from(decoder.mass));
    byId("parts").replaceChildren(
      element("thead", {}, row("th", "part", "of the mass", "turned", "moved")),
      element("tbody", {}, ...range(decoder.parts).map((p) => {
        const line = row("td", "", `${Math.round((100 * decoder.mass[p]) / whole)} %`, "", "");
        line.cells[0].append(swatch(molecule.palette[p]), String(p + 1));
        return line;
      })));
    byId("states-card").hidden = !data.states.length;
    byId("states").replaceChildren(
      element("thead", {}, row("th", "state", "population", "resolution", "")),
      element("tbody", {}, ...data.states.map((state, k) => {
        const line = row("td", "", population(state), state.resolution === null ? "–" : `${state.resolution.toFixed(2)} Å`, "");
        const go = element("button", { type: "button", textContent: state.name, title: "Show it" });
        go.addEventListener("click", () => { release(); pinned = true; goTo(state.latent); });
        const take = element("button", { type: "button", textContent: "Select", title: `Select the particles nearest to ${state.name}` });
        take.addEventListener("click", (event) => {
          const near = nearestStates();
          select(selectionOf((i) => near[i] === k), event);
        });
        line.cells[0].append(go);
        line.cells[3].append(take);
        return line;
      })));
  }

  const selectionOf = (test) => Array.from({ length: data.count }, (_, i) => i).filter(test);

  // ---- begin
  const axes = plane.axes.map(({ name }, n) => [n, name]);
  fill(byId("axis-x"), axes.filter(([n]) => plane.axes[n].row));
  fill(byId("axis-y"), axes);
  byId("axis-y").value = data.latents > 1 ? 1 : axes.length - 1;
  fill(byId("particle-colour"), [
    ["population", "population"], ...(data.cluster ? [["cluster", "class"]] : []), ...(data.states.length ? [["state", "nearest state"]] : []),
    ["turn", "turn of a part"], ["shift", "shift of a part"], ["gain", "gain"],
    ...["defocus", "micrograph", "grey"].filter((name) => data[name]).map((name) => [name, columnColours[name][0].split(",")[0]]),
    ...(new Set(data.half).size > 1 ? [["half", "half"]] : []), ["none", "one colour"],
  ]);
  fill(byId("half"), data.decoders.map(({ half }, n) => [n, half ? `of half ${half}` : "of all particles"]));
  byId("half-choice").hidden = data.decoders.length < 2;
  plane.setPlane(0, Number(byId("axis-y").value));
  useDecoder(0);
  buildTables();
  chooseTool("move");
  chooseView("surface");
  showSelection();
  showPlaying();
  drawHistograms();
  theme.follow(themeChanged);
  for (const each of document.querySelectorAll("canvas")) {
    each.addEventListener("webglcontextlost", () => fail("the browser has taken the graphics away; load the page again"));
  }
  const resized = new ResizeObserver(() => {
    plane.measure();
    molecule.measure();
    touch("plane", "molecule");
  });
  resized.observe(stage);
  resized.observe(canvas);
  requestAnimationFrame(frame);

  // For the console, and for tests.
  globalThis.explorer = {
    data, plane, molecule, counts, goTo, rowsText, tableText, Density, Surface, Projection,
    get latent() { return latent; },
    decode: (z, n = 0) => data.decoders[n].decode(z),
    motion: (z, part) => motions.of(part, decoder.numbers(z)),
  };
}

// ---- small things

const range = (n) => Array.from({ length: n }, (_, i) => i);

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const row = (kind, ...texts) => element("tr", {}, ...texts.map((textContent) => element(kind, { textContent })));
const fill = (select, options) => select.replaceChildren(...options.map(([value, text]) => element("option", { value, textContent: text })));

function swatch(colour) {
  const made = element("span", { className: "swatch" });
  made.style.background = css(colour);
  return made;
}

const swatchLegend = (entries) =>
  element("div", { className: "swatches" }, ...entries.map(([colour, text]) => element("span", {}, swatch(colour), text)));

function rampLegend(map, label, low, high) {
  const bar = element("i", {});
  bar.style.background = `linear-gradient(90deg, ${MAPS[map].join(", ")})`;
  const ends = [low, high].map((textContent) => element("span", { textContent }));
  return element("div", {}, element("div", { textContent: label }), element("div", { className: "ramp" }, ends[0], bar, ends[1]));
}

function population({ population: share, interval }) {
  const percent = (value) => (100 * value).toFixed(value < 0.1 ? 1 : 0);
  return interval ? `${percent(share)} % (${percent(interval[0])}–${percent(interval[1])})` : `${percent(share)} %`;
}

const describe = (state) => population(state) + (state.resolution === null ? "" : `, ${state.resolution.toFixed(2)} Å`);

/** Where there are most particles: a state that exists, as the consensus may not. */
function startLatent({ points, weights, latents, consensus }) {
  if (!weights.length) return consensus;
  const most = weights.indexOf(weights.reduce((a, b) => Math.max(a, b)));
  return Float64Array.from(points.subarray(most * latents, (most + 1) * latents));
}

/** How far Gaussians go from the consensus over some particles: Å that 97 % stay within, and the part that goes farthest. */
function travel(decoder, { latent, latents, count, consensus }) {
  const before = decoder.decode(consensus).position;
  const { position, amplitude } = decoder.decode(consensus);
  const all = [], ways = new Float64Array(decoder.parts), members = new Float64Array(decoder.parts);
  const stride = Math.max(1, Math.floor(count / 24));
  for (let i = 0; i < count; i += stride) {
    decoder.decode(Float64Array.from(latent.subarray(i * latents, (i + 1) * latents)), position, amplitude);
    for (let g = i % 16; g < decoder.count; g += 16) {
      const way = Math.hypot(position[3 * g] - before[3 * g], position[3 * g + 1] - before[3 * g + 1], position[3 * g + 2] - before[3 * g + 2]);
      all.push(way);
      ways[decoder.part[g]] += way;
      members[decoder.part[g]]++;
    }
  }
  const mean = Array.from(ways, (way, p) => way / Math.max(1, members[p]));
  return { farthest: Math.max(1e-3, quantiles(all, [0.97])[0]), liveliest: mean.indexOf(Math.max(...mean)) };
}

/** A vector turned by a quaternion. */
function rotated([w, x, y, z], v) {
  const u = [x, y, z];
  const t = cross(u, v).map((value) => 2 * value);
  const s = cross(u, t);
  return v.map((value, k) => value + w * t[k] + s[k]);
}

/** Angles (degrees, −180 to 180) about the axis that most of the turning is about, and how far they go. */
function signedTurns(quaternions) {
  const count = quaternions.length / 4;
  const spread = range(3).map(() => [0, 0, 0]);
  for (let i = 0; i < count; i++) {
    for (let a = 0; a < 3; a++) for (let b = 0; b < 3; b++) spread[a][b] += quaternions[4 * i + 1 + a] * quaternions[4 * i + 1 + b];
  }
  const axis = eigen(spread).vectors[0];
  const angles = Float32Array.from({ length: count }, (_, i) => {
    const along = axis[0] * quaternions[4 * i + 1] + axis[1] * quaternions[4 * i + 2] + axis[2] * quaternions[4 * i + 3];
    return (360 / Math.PI) * Math.atan2(along, quaternions[4 * i]);
  });
  return { angles, widest: Math.max(1, quantiles(angles.map(Math.abs), [0.98])[0]) };
}

function fail(reason) {
  byId("failure").textContent = `The explorer cannot be drawn here: ${reason}.`;
  byId("failure").hidden = false;
}

try {
  start();
} catch (error) {
  console.error(error);
  fail(error.message);
}
