"use strict";
// One plot of curves as SVG: axes at round numbers, a legend that hides and shows, values under pointer and arrow keys.

const hiddenCurves = new Map(); // what the user has hidden or shown, by plot and curve

function element(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "g", "rect", "circle", "tspan"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) made.style.setProperty(name, value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

function roundStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least * (1 - 1e-9));
}

function ticks(low, high, count) {
  const step = roundStep(Math.max((high - low) / count, 1e-12));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

function shown(value) {
  if (value === null || !Number.isFinite(value)) return "not defined";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

function plotOf(panel) {
  const holder = element("div", {class: "plot"});
  const drawing = element("div");
  const legend = element("ul", {class: "legend"});
  const tip = element("div", {class: "tip", hidden: true, "aria-live": "polite"});
  const key = (curve) => `${panel.kind} ${panel.title} ${curve.name.split(":").slice(0, -1).join(":") || curve.name}`;
  const isHidden = (curve) => hiddenCurves.get(key(curve)) ?? Boolean(curve.hidden);
  let place = null; // of the cursor among the abscissae
  const last = panel.curves.map((curve) => `${curve.name}: ${shown(curve.y.at(-1))}`).join("; ");

  function draw() {
    const width = Math.max(drawing.clientWidth, 240), height = 300;
    const edge = {left: 56, right: 12, top: 8, bottom: panel.kind === "fsc" ? 56 : 42};
    const curves = panel.curves.filter((curve) => !isHidden(curve));
    const points = (curves.length ? curves : panel.curves).flatMap((curve) =>
      curve.x.map((x, i) => [x, curve.y[i]]).filter(([, y]) => y !== null));
    const svg = element("svg", {height, viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0,
      "aria-label": `${panel.title}. ${panel.up} against ${panel.across}. Last values: ${last}. Arrow keys read values.`});
    if (!points.length) {
      svg.append(element("text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, "no value so far"));
      drawing.replaceChildren(svg);
      return;
    }
    const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
    let [x0, x1] = [panel.kind === "fsc" ? 0 : Math.min(...xs), Math.max(...xs)];
    let [y0, y1] = [panel.low ?? Math.min(...ys), panel.high ?? Math.max(...ys)];
    if (panel.kind === "loss" && curves.length) [y0, y1] = withoutStart(curves, y0, y1);
    if (x1 <= x0) [x0, x1] = [x0 - 1, x1 + 1];
    if (y1 <= y0) [y0, y1] = [y0 - 0.5 * (Math.abs(y0) || 1), y1 + 0.5 * (Math.abs(y1) || 1)];
    if (panel.low === undefined) [y0, y1] = [y0 - 0.05 * (y1 - y0), y1 + 0.05 * (y1 - y0)];
    const across = (x) => edge.left + (width - edge.left - edge.right) * (x - x0) / (x1 - x0);
    const up = (y) => height - edge.bottom - (height - edge.top - edge.bottom) * (y - y0) / (y1 - y0);
    const floor = height - edge.bottom;
    for (const tick of ticks(x0, x1, width < 380 ? 4 : 6)) {
      const x = across(tick);
      svg.append(element("line", {class: "grid", x1: x, x2: x, y1: edge.top, y2: floor}));
      svg.append(element("text", {x, y: floor + 16, "text-anchor": "middle"}, shown(tick)));
      if (panel.kind === "fsc" && tick > 0) {
        svg.append(element("text", {x, y: floor + 31, "text-anchor": "middle"}, `${(1 / tick).toPrecision(3)} Å`));
      }
    }
    for (const tick of ticks(y0, y1, 6)) {
      svg.append(element("line", {class: "grid", x1: edge.left, x2: width - edge.right, y1: up(tick), y2: up(tick)}));
      svg.append(element("text", {x: edge.left - 6, y: up(tick) + 4, "text-anchor": "end"}, shown(tick)));
    }
    svg.append(element("path", {class: "axis", d: `M${edge.left},${edge.top}V${floor}H${width - edge.right}`}));
    svg.append(element("text", {x: (edge.left + width - edge.right) / 2, y: height - 6, "text-anchor": "middle"}, panel.across));
    svg.append(element("text", {x: 12, y: (edge.top + floor) / 2, "text-anchor": "middle",
      transform: `rotate(-90 12 ${(edge.top + floor) / 2})`}, panel.up));
    if (panel.threshold !== undefined) {
      const y = up(panel.threshold);
      svg.append(element("line", {class: "threshold", x1: edge.left, x2: width - edge.right, y1: y, y2: y}));
      svg.append(element("text", {x: edge.left + 5, y: y - 4}, String(panel.threshold)));
    }
    const clipped = (y) => Math.min(Math.max(y, y0), y1);
    if (panel.band && curves.includes(panel.curves[0])) {
      const [low, high] = panel.band, x = panel.curves[0].x;
      const known = x.map((_, i) => i).filter((i) => low[i] !== null && high[i] !== null);
      const way = [...known.map((i) => [x[i], high[i]]), ...known.reverse().map((i) => [x[i], low[i]])];
      if (way.length) {
        svg.append(element("path", {class: "band", d: `M${way.map(([a, b]) => `${across(a)},${up(clipped(b))}`).join("L")}Z`}));
      }
    }
    for (const curve of curves) {
      let way = "", down = false;
      curve.x.forEach((x, i) => {
        const y = curve.y[i];
        if (y === null || x === null) { down = false; return; }
        way += `${down ? "L" : "M"}${across(x).toFixed(1)},${up(clipped(y)).toFixed(1)}`;
        down = true;
      });
      svg.append(element("path", {class: "curve", d: way || "M0,0", "--c": curve.color, "stroke-dasharray": curve.dash.join(" ") || null}));
      if (curve.x.length === 1 && curve.y[0] !== null) {
        svg.append(element("circle", {class: "dot", cx: across(curve.x[0]), cy: up(curve.y[0]), r: 3.5, "--c": curve.color}));
      }
    }
    const cursor = element("g");
    svg.append(cursor);
    drawing.replaceChildren(svg);

    const all = [...new Set(curves.flatMap((curve) => curve.x))].filter((x) => x !== null && x >= x0).sort((a, b) => a - b);
    function show(number) {
      place = number;
      cursor.replaceChildren();
      tip.hidden = number === null || !all.length;
      if (tip.hidden) return;
      const x = all[Math.min(Math.max(number, 0), all.length - 1)];
      cursor.append(element("line", {class: "cursor", x1: across(x), x2: across(x), y1: edge.top, y2: floor}));
      const rows = [];
      for (const curve of curves) {
        const i = nearest(curve.x, x);
        if (i < 0 || curve.y[i] === null || Math.abs(curve.x[i] - x) > (x1 - x0) / 40) continue;
        cursor.append(element("circle", {class: "dot", cx: across(curve.x[i]), cy: up(clipped(curve.y[i])), r: 3, "--c": curve.color}));
        rows.push(element("p", {}, `${curve.name}: ${shown(curve.y[i])}`));
      }
      const head = panel.kind === "fsc" && x > 0 ? `${(1 / x).toPrecision(3)} Å (${shown(x)} 1/Å)` : `${panel.across} ${shown(x)}`;
      tip.replaceChildren(element("p", {class: "quiet"}, head), ...rows);
      const right = across(x) > width / 2;
      tip.style.left = right ? "auto" : `${across(x) + 10}px`;
      tip.style.right = right ? `${width - across(x) + 10}px` : "auto";
    }
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = x0 + (x1 - x0) * ((event.clientX - box.left) * width / box.width - edge.left) / (width - edge.left - edge.right);
      show(nearest(all, x));
    });
    svg.addEventListener("pointerleave", () => show(null));
    svg.addEventListener("blur", () => show(null));
    svg.addEventListener("keydown", (event) => {
      const steps = {ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10};
      if (event.key in steps) show(Math.min(Math.max((place ?? -1) + steps[event.key], 0), all.length - 1));
      else if (event.key === "Home") show(0);
      else if (event.key === "End") show(all.length - 1);
      else if (event.key === "Escape") show(null);
      else return;
      event.preventDefault();
    });
  }

  function listed() {
    const before = [...legend.querySelectorAll("button")].indexOf(document.activeElement);
    legend.replaceChildren(...panel.curves.map((curve) => {
      const line = element("svg", {height: 8, viewBox: "0 0 30 8", "aria-hidden": "true"},
        element("path", {class: "curve", d: "M0,4H30", "--c": curve.color, "stroke-dasharray": curve.dash.join(" ") || null}));
      const button = element("button", {type: "button", "aria-pressed": String(!isHidden(curve)), onclick: () => {
        hiddenCurves.set(key(curve), !isHidden(curve));
        draw();
        listed();
      }}, line, curve.name);
      return element("li", {}, button);
    }));
    if (before >= 0) legend.querySelectorAll("button")[before]?.focus();
  }

  holder.append(element("h3", {}, panel.title), drawing, legend, tip);
  listed();
  new ResizeObserver(draw).observe(drawing); // also once it is in the page
  return holder;
}

// The first steps of a loss are far above all that follows: the axis shows what is left after a twentieth.
function withoutStart(curves, y0, y1) {
  const later = curves.flatMap((curve) => curve.y.slice(Math.floor(curve.y.length / 20))).filter((y) => y !== null);
  return later.length > 20 ? [y0, Math.max(...later)] : [y0, y1];
}

function nearest(sorted, x) {
  let low = 0, high = sorted.length - 1;
  if (high < 0) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(sorted[low] - x) <= Math.abs(sorted[high] - x) ? low : high;
}
