"""The frame of the page: its HTML, its style, and the few lines that hand the figures to Plotly."""

from __future__ import annotations

# The policy lets the browser itself refuse every access to a network.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<title>emsplat: {name}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{name}</h1><p>{kind}, by emsplat</p><p>{facts}</p><nav>{links}</nav></header>
{warnings}
<noscript><p class="warnings">Interactive figures need JavaScript. The same figures lie beside this page as PNG and \
SVG.</p></noscript>
{body}
</main>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""

# Plotly offers by itself to upload a figure to its maker's server: unpublished data stay here.
# One figure that fails, for want of WebGL say, must not take the others with it.
SCRIPT = """
const config = {
  responsive: true,
  displaylogo: false,
  showSendToCloud: false,
  plotlyServerURL: "",
  modeBarButtonsToRemove: ["lasso2d", "select2d", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
};
// Browsers do not print what WebGL has drawn: paper gets a picture of it, in the view last chosen.
async function keepForPrint(holder) {
  const picture = new Image();
  picture.className = "for-print";
  picture.alt = holder.getAttribute("aria-label");
  const take = async () => { picture.src = await Plotly.toImage(holder, {format: "png", width: 900, height: 620}); };
  let waiting;
  for (const event of ["plotly_relayout", "plotly_sliderchange"]) {
    holder.on(event, () => { clearTimeout(waiting); waiting = setTimeout(take, 400); });
  }
  await take();
  holder.after(picture);
  holder.classList.add("screen-only");
}
async function draw(holder) {
  try {
    const figure = JSON.parse(holder.textContent);
    holder.replaceChildren();
    await Plotly.newPlot(holder, figure.data, figure.layout, config);
    if (figure.layout.scene) await keepForPrint(holder);
  } catch (error) {
    console.error(error);
    holder.textContent = "This figure cannot be drawn here: " + error.message;
  }
}
document.querySelectorAll(".plot").forEach(draw);
"""

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: #f3f4f6; color: #1b1f24; }
body { font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
header p { margin: 0; color: #555d68; }
nav { display: flex; flex-wrap: wrap; gap: .2rem .9rem; margin: .5rem 0 1rem; font-size: .88rem; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 .8rem; font-size: 1.2rem; }
h3 { margin: 1.1rem 0 .35rem; font-size: .95rem; }
section { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; }
section { padding: 1.1rem 1.2rem; margin: 0 0 1rem; min-width: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.headline { border-left: 8px solid #0072b2; background: #eaf3f9; border-radius: 4px; padding: .7rem .9rem; }
.headline p { margin: .3rem 0 0; max-width: 46rem; }
.headline ul { margin: .3rem 0 0; padding-left: 1.2rem; max-width: 46rem; }
.number { font-size: 2.1rem; font-weight: 650; line-height: 1.2; }
.warnings { border-left: 8px solid #d55e00; background: #fdf3ec; border-radius: 4px; }
.warnings { padding: .7rem .9rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
.warnings h2 { margin: 0; font-size: 1rem; }
.warnings ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.notes { border-left-color: #8c96a3; background: #fff; }
.bad { color: #b03a00; font-weight: 650; }
.short { white-space: nowrap; }
.missing { color: #555d68; font-style: italic; overflow-wrap: anywhere; }
.note { margin: .4rem 0 0; font-size: .9rem; color: #3d454f; max-width: 46rem; }
.saved { margin: .3rem 0 .8rem; font-size: .82rem; color: #555d68; }
.plot { width: 100%; overflow: hidden; }
.for-print { display: none; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: .6rem; }
.pair > * { min-width: 0; }
.groups { columns: 24rem; column-gap: 2rem; }
.groups > div { break-inside: avoid; padding-top: .4rem; }
.groups h3 { margin-top: .5rem; }
.scroll { overflow-x: auto; }
.triples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: .9rem; }
.triples figure { margin: 0; display: grid; grid-template-columns: repeat(3, 1fr); gap: 3px; }
.triples img { width: 100%; }
.triples figcaption { grid-column: 1 / -1; font-size: .82rem; color: #555d68; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
td, th { padding: .3rem .5rem .3rem 0; border-bottom: 1px solid #e8ebef; }
td, th { text-align: left; vertical-align: top; }
th { width: 40%; font-weight: 400; color: #555d68; }
.grid { margin: .6rem 0; }
.grid th { width: auto; }
.grid td:first-child { color: #555d68; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
dt { font-weight: 650; margin: .7rem 0 .1rem; }
dd { margin: 0; max-width: 46rem; }
a { color: #005a8e; }
details { margin-top: 1rem; }
summary { cursor: pointer; font-size: .95rem; font-weight: 650; }
pre { overflow-x: auto; background: #f7f9fb; padding: .8rem; border-radius: 4px; font-size: .82rem; }
@media print {
  body { background: #fff; font-size: 11pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  section { border: 0; padding: 0; margin: 0 0 1.2rem; }
  img, .headline, .warnings, .plot, figure, tr { break-inside: avoid; }
  h2, h3, dt { break-after: avoid; }
  pre { white-space: pre-wrap; }
  /* Figures keep the width they had on the screen; paper is narrower. */
  .plot { zoom: .75; }
  .screen-only, .modebar { display: none !important; }
  .for-print { display: block; }
  .pair { grid-template-columns: 1fr 1fr; }
}
"""
