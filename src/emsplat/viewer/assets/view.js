"use strict";
// The page: asks what has changed while it is seen, and draws only that. Text from files reaches it as text.

const main = document.getElementById("main"), title = document.getElementById("title");
const chosen = new Set(); // keys of the runs that are to be compared
let filter = "", sections = new Map(), marks = new Map(), said = "", timer = 0, failures = 0, asked = 0;

const EVERY = {runs: 3000, run: 2000, compare: 3000}; // ms

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 1) return "less than a second";
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return seconds < 7200 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function moment(seconds) {
  if (!seconds) return "";
  const date = new Date(1000 * seconds), today = new Date().toDateString() === date.toDateString();
  const time = date.toLocaleTimeString([], {hour: "2-digit", minute: "2-digit", hourCycle: "h23"});
  return today ? time : `${date.toLocaleDateString([], {day: "numeric", month: "short", year: "numeric"})}, ${time}`;
}

function state(run) {
  const look = run.status === "quiet" ? "quiet-run" : run.status;
  return element("span", {class: `state ${look}`}, run.status === "quiet" ? "no sign of life" : run.status);
}

// A part of the page, made anew only where what it shows has changed.
function part(name, data, make) {
  const text = JSON.stringify(data);
  const before = sections.get(name);
  if (before && before.text === text) return before.node;
  const node = make(data);
  sections.set(name, {text, node});
  return node;
}

// Nodes that stay are not touched: what has the focus keeps it, and what is scrolled stays so.
function fill(nodes) {
  const wanted = nodes.filter(Boolean);
  for (const node of [...main.children]) if (!wanted.includes(node)) node.remove();
  wanted.forEach((node, i) => { if (main.children[i] !== node) main.insertBefore(node, main.children[i] ?? null); });
}

function section(heading, ...children) {
  return element("section", {"aria-label": heading}, element("h2", {}, heading), ...children);
}

function table(head, rows) {
  return element("table", {}, element("thead", {}, element("tr", {}, head.map((text) => element("th", {scope: "col"}, text)))),
    element("tbody", {}, rows.map((row) => element("tr", {}, row.map((cell) => element("td", {}, cell))))));
}

function heading(text, crumb, facts = "") {
  title.textContent = text;
  document.title = `${text} · emsplat view`;
  document.getElementById("crumb").replaceChildren(...crumb);
  document.getElementById("facts").textContent = facts;
}

function progress(now, whole = null) {
  const all = whole === null ? "" : `about ${duration(whole)} left of the run`;
  if (!now) return all ? element("p", {class: "small"}, all) : null;
  const share = Math.min(now.done / now.total, 1);
  const left = now.left === null ? "" : `, about ${duration(now.left)} left in this part`;
  return element("div", {class: "now"},
    element("progress", {max: 1, value: share, "aria-label": now.name}),
    element("p", {class: "small"}, `${now.name}: ${Math.round(100 * share)} %${left}${all && `; ${all}`}`));
}

// The list

function listOf(found) {
  heading("Runs", [], `below ${found.folder}`);
  const runs = found.runs.filter((run) => `${run.name} ${run.program} ${run.status}`.toLowerCase().includes(filter));
  for (const key of chosen) if (!found.runs.some((run) => run.key === key)) chosen.delete(key);
  const bar = part("bar", found.runs.length > 8, (many) => element("div", {class: "bar"},
    element("button", {type: "button", class: "main", id: "compare", onclick: () => { location.hash = `#/compare/${[...chosen].join("/")}`; }}),
    many && element("input", {type: "search", placeholder: "name, program or status", "aria-label": "Show only runs with these words",
      value: filter, oninput: (event) => { filter = event.target.value.trim().toLowerCase(); ask(); }})));
  const button = bar.querySelector("#compare");
  button.disabled = chosen.size !== 2;
  button.textContent = chosen.size === 2 ? "Compare the two" : "Tick two runs to compare";
  const waits = found.runs.length || found.looking ? null : part("waits", 0, () => section("No runs yet",
    element("p", {}, "This page waits for a folder with a journal, which every run of emsplat begins with: reconstruct, backproject, " +
      "refine, abinitio, heterogeneity, nulltest. Runs that begin later appear here by themselves."),
    element("p", {class: "note"}, "Hidden folders and links are not followed.")));
  const rows = part("rows", runs, (list) => element("section", {"aria-label": "Runs"}, list.length ? element("table", {class: "runs"},
    element("thead", {}, element("tr", {}, [["", "Compare"], ["Run"], ["Program"], ["Status"], ["Result"], ["Began"], ["Took"]].map(
      ([text, unseen]) => element("th", {scope: "col"}, unseen ? element("span", {class: "unseen"}, unseen) : text)))),
    element("tbody", {}, list.map(rowOf))) : element("p", {}, "No run has these words.")));
  const cut = found.cut || found.left_out || found.looking ? part("cut", [found.cut, found.left_out, found.looking], () => element("p", {class: "note"},
    (found.looking ? "Still looking through the folders. " : "") +
    (found.left_out ? `${found.left_out} older runs are left out. ` : "") +
    (found.cut ? "There are too many folders to look at all of them: name one further down, emsplat view FOLDER/BELOW." : ""))) : null;
  fill([found.runs.length > 1 ? bar : null, waits ?? (found.runs.length ? rows : null), cut]);
}

function rowOf(run) {
  const box = element("input", {type: "checkbox", "aria-label": `Compare ${run.name}`, onchange: (event) => {
    if (event.target.checked) chosen.add(run.key); else chosen.delete(run.key);
    ask();
  }});
  box.checked = chosen.has(run.key);
  const number = run.headline;
  return element("tr", {},
    element("td", {}, box),
    element("td", {}, element("a", {href: `#/run/${run.key}`}, run.name),
      run.report ? element("div", {class: "small"}, element("a", {href: run.report}, "report")) : null,
      run.warnings ? element("div", {class: "small"}, `${run.warnings} warning${run.warnings > 1 ? "s" : ""}`) : null),
    element("td", {"data-label": "Program", class: "tight"}, run.program),
    element("td", {}, state(run), run.part ? element("span", {class: "small"}, ` ${run.part}`) : null, progress(run.progress, run.left)),
    element("td", {"data-label": "Result"}, number ? [number.number, number.final ? null : element("div", {class: "small"}, number.measure)] : ""),
    element("td", {"data-label": "Began", class: "tight"}, moment(run.began)),
    element("td", {"data-label": "Took", class: "tight"}, duration(run.seconds)));
}

// One run

function runOf(run) {
  heading(run.name, [element("a", {href: "#/"}, "All runs")],
    [run.program && `emsplat ${run.program}`, ...run.facts, run.facts.length ? "" : run.particles.split("/").at(-1)].filter(Boolean).join(" · "));
  if (said && said !== `${run.status} ${run.part}`) document.getElementById("said").textContent = `${run.status}, ${run.part}`;
  said = `${run.status} ${run.part}`;
  const about = {...run, log: 0, panels: 0, pictures: 0, settings: 0, warned: 0, changed: run.status === "running" ? 0 : run.changed};
  fill([
    part("state", about, stateOf),
    run.warned.length ? part("warned", run.warned, (texts) => element("div", {class: "warnings"},
      element("h2", {}, "Warnings"), element("ul", {}, texts.map((text) => element("li", {}, text))))) : null,
    run.pictures.length ? picturesOf(run.pictures) : null,
    run.panels.length ? curvesOf(run.panels) : null,
    run.log.length ? logOf(run.log) : null,
    run.settings.length ? part("settings", run.settings, (rows) => element("section", {"aria-label": "Settings"},
      element("details", {}, element("summary", {}, "Settings"), table(["Setting", "Value"], rows)))) : null,
  ]);
}

function stateOf(run) {
  const number = run.headline;
  const first = number && element("div", {class: "headline"},
    element("div", {class: "number"}, number.number),
    element("p", {}, `${number.measure[0].toUpperCase()}${number.measure.slice(1).replace(/\.$/, "")}.`),
    number.remarks?.length ? element("ul", {}, number.remarks.map((text) => element("li", {}, text))) : null);
  const last = run.status !== "running" && run.changed ? `, last heard of ${moment(run.changed)}` : "";
  const times = [run.began && `began ${moment(run.began)}`, run.seconds !== null && `took ${duration(run.seconds)}`,
    run.resumed && "resumed", run.host && `on ${run.host}`].filter(Boolean).join(", ");
  const now = run.progress;
  return element("section", {"aria-label": "State"},
    element("p", {}, state(run), run.status_text ? ` (${run.status_text})` : "", run.why ? `: ${run.why}` : "",
      element("span", {class: "quiet"}, ` ${times}${run.status === "finished" ? "" : last}`)),
    progress(now, run.status === "running" ? run.left : null),
    now ? element("p", {class: "small"}, [`${now.done.toLocaleString()} of ${now.total.toLocaleString()} ${now.unit}`,
      now.rate && `${Number(now.rate.toPrecision(3)).toLocaleString()} ${now.unit}/s`, now.remark].filter(Boolean).join(", ")) : null,
    first,
    element("ol", {class: "steps", "aria-label": "Parts of the work"}, run.parts.map((one) => element("li",
      {class: {now: "now-part", "to come": "to-come"}[one.state] ?? "", "aria-current": one.state === "now" ? "step" : null, title: one.text || null},
      one.name, element("span", {class: "quiet"},
        one.state === "done" || one.state === "ended" ? ` ${duration(one.seconds)}` : one.state === "to come" ? " to come" : " now")))),
    run.pages.length ? element("p", {}, run.pages.map((page, i) => [i ? " · " : "", element("a", {href: page.url}, page.name)])) : null);
}

function picturesOf(pictures) {
  const holder = part("pictures", pictures.map((one) => one.name), () => section("Slices",
    element("div", {class: "pictures"}, pictures.map((one) => element("figure", {},
      element("img", {class: "slices", "data-map": one.name}), element("figcaption", {}, one.title)))),
    element("p", {class: "note"}, "Central slices xy, xz and yz, the first axis to the right, the second up; white is dense. " +
      "Maps on their way change now and then.")));
  for (const [i, one] of pictures.entries()) {
    const image = holder.querySelectorAll("img")[i];
    if (image.dataset.url === one.url) continue;
    image.dataset.url = one.url;
    const next = new Image(); // the one that is shown stays until the next is there
    next.onload = () => { image.src = next.src; image.alt = `Central slices of the map: ${one.title}`; };
    next.onerror = () => { if (!image.src) image.alt = `No slices of ${one.name}: it is large, or half written`; };
    next.src = one.url;
  }
  return holder;
}

function curvesOf(panels) {
  const kinds = panels.map((panel) => `${panel.kind} ${panel.title}`);
  const holder = part("curves", kinds, () => section("Curves",
    element("div", {class: "pair"}, kinds.map(() => element("div", {class: "place"}))),
    element("p", {class: "note"}, "Press a name to hide or show its curve. Values are read with the pointer or, in a plot, with the arrow keys.")));
  const places = holder.querySelectorAll(".place");
  panels.forEach((panel, i) => {
    const text = JSON.stringify(panel);
    if (places[i].dataset.mark === String(hash(text))) return;
    const focused = places[i].querySelector("svg[tabindex]") === document.activeElement && places[i].contains(document.activeElement);
    places[i].dataset.mark = String(hash(text));
    places[i].replaceChildren(plotOf(panel));
    if (focused) requestAnimationFrame(() => requestAnimationFrame(() => places[i].querySelector("svg[tabindex]")?.focus()));
  });
  return holder;
}

function hash(text) {
  let value = 7;
  for (let i = 0; i < text.length; i++) value = (31 * value + text.charCodeAt(i)) | 0;
  return value;
}

function logOf(lines) {
  const holder = part("log", 0, () => section("Log", element("pre", {tabindex: 0, "aria-label": "The last lines of run.log"})));
  const pre = holder.querySelector("pre"), text = lines.join("\n");
  if (pre.textContent !== text) {
    const atEnd = pre.scrollTop + pre.clientHeight >= pre.scrollHeight - 8;
    pre.textContent = text;
    if (atEnd) requestAnimationFrame(() => { pre.scrollTop = pre.scrollHeight; });
  }
  return holder;
}

// Two runs

function comparisonOf(found, keys) {
  const [a, b] = found.runs;
  heading(`${a.name} and ${b.name}`, [element("a", {href: "#/"}, "All runs")]);
  const row = (label, run) => [label, element("a", {href: `#/run/${run.key}`}, run.name), run.program, state(run),
    run.headline ? `${run.headline.number}${run.headline.final ? "" : " so far"}` : "", duration(run.seconds)];
  fill([
    part("both", found.runs, () => section("The two runs",
      table(["", "Run", "Program", "Status", "Result", "Took"], [row("A", a), row("B", b)]))),
    part("different", found.settings, (rows) => section("Settings that differ",
      rows.length ? table(["Setting", "A", "B"], rows) : element("p", {}, "None: both have the same settings."))),
    found.panels.length ? curvesOf(found.panels) : null,
    part("maps", [found.maps, keys, a.changed, b.changed], () => section("Difference of the maps", differenceOf(found.maps, keys))),
  ]);
}

function differenceOf(maps, keys) {
  if (!maps.every(Boolean)) {
    const which = maps.map((there, i) => there ? "" : "AB"[i]).filter(Boolean).join(" and ");
    return element("p", {}, `${which} ${which.length > 1 ? "have" : "has"} no map yet: it comes at the end of a run.`);
  }
  const holder = element("div", {}, element("p", {class: "quiet"}, "Being computed."));
  fetch(`/api/difference/${keys.join("/")}`).then(async (answer) => {
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    holder.replaceChildren(element("figure", {},
      element("img", {class: "slices", alt: "Central slices of A, of B scaled to A, and of their difference", src: `/difference/${keys.join("/")}`}),
      element("figcaption", {}, "From left to right: A, B, A minus B. From top to bottom: central slices xy, xz, yz.")),
      ...found.remarks.map((text) => element("p", {class: "note"}, text)));
  }).catch((error) => holder.replaceChildren(element("p", {}, error.message)));
  return holder;
}

// Asking

function way() {
  const [, kind = "", ...keys] = location.hash.replace(/^#/, "").split("/").map(encodeURIComponent);
  if (kind === "run" && keys.length === 1) return {kind, keys, url: `/api/run/${keys[0]}`, show: runOf};
  if (kind === "compare" && keys.length === 2) {
    return {kind, keys, url: `/api/compare/${keys.join("/")}`, show: (found) => comparisonOf(found, keys)};
  }
  return {kind: "runs", keys: [], url: "/api/runs", show: listOf};
}

const answers = new Map(); // the last answer under each address

async function ask() {
  clearTimeout(timer);
  const here = way(), number = ++asked, link = document.getElementById("link");
  let wait = EVERY[here.kind], answered = false;
  try {
    const before = answers.get(here.url);
    const answer = await fetch(here.url, {headers: before ? {"If-None-Match": before.mark} : {}, cache: "no-store"});
    if (number !== asked) return; // the page has moved on
    answered = true;
    if (answer.status === 403) {
      fill([element("p", {class: "warnings"}, "emsplat view was started anew, or the cookie is gone: open the address that it has printed.")]);
      link.textContent = "";
      return;
    }
    if (answer.status === 200) answers.set(here.url, {mark: answer.headers.get("ETag"), found: await answer.json()});
    else if (answer.status !== 304) {
      const found = await answer.json();
      fill([element("p", {class: "warnings"}, found.error), element("p", {}, element("a", {href: "#/"}, "All runs"))]);
      link.textContent = "";
      timer = setTimeout(ask, wait);
      return;
    }
    failures = 0;
    here.show(answers.get(here.url).found);
    const found = answers.get(here.url).found;
    link.classList.remove("lost");
    const rests = here.kind === "run" && found.status === "finished";
    link.textContent = rests ? "" : "live";
    if (rests) wait = 10000;
    if (here.kind === "runs" && found.looking) wait = 300;
  } catch (error) {
    if (number !== asked) return;
    if (answered) console.error(error);
    failures += 1;
    wait = Math.min(wait * 2 ** failures, 20000);
    link.classList.add("lost");
    link.textContent = "no connection: is emsplat view still running, and the tunnel open? Trying again.";
  }
  if (!document.hidden) timer = setTimeout(ask, wait);
}

window.addEventListener("hashchange", () => {
  sections = new Map();
  said = "";
  main.replaceChildren();
  ask().then(() => { main.focus(); window.scrollTo(0, 0); });
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
ask();
