"""Makes the pictures of the tutorials again: `python docs/pictures.py`, three minutes.

The run is that of `make demo`, with the same seeds; what it prints is what docs/tutorial.md quotes. With --cost the
picture of docs/cost.md is made instead, from benchmarks/results/cost.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
from PIL import Image

from _ext.notebook import code_of

FIGURES = {"run": ("slices", "fsc"), "harder_run": ("fsc", "local_resolution_slices", "directions")}
WIDTH = 1000  # pixels
DOCS = Path(__file__).parent


def shrink(picture: Path, target: Path) -> None:
    """A picture no wider than the page, with 256 colours."""
    image = Image.open(picture).convert("RGB")
    image.thumbnail((WIDTH, 10 * WIDTH))
    image.quantize(256).save(target, optimize=True)


def draw_cost() -> None:
    """Seconds over particles, box and Gaussians, each series with its limit."""
    from matplotlib.figure import Figure

    rows = json.loads((DOCS.parent / "benchmarks" / "results" / "cost.json").read_text())["rows"]
    figure = Figure(figsize=(10, 3.6), dpi=110, layout="constrained")
    for axes, size in zip(figure.subplots(1, 3), ("particles", "box", "Gaussians"), strict=True):
        for number, name in enumerate(dict.fromkeys(row["series"] for row in rows if size in row)):
            own = [row for row in rows if row["series"] == name]
            sizes, colour = [row[size] for row in own], ("#0072b2", "#d55e00")[number]
            axes.loglog(sizes, [row["seconds"] for row in own], "o-", color=colour, label=name)
            axes.loglog(sizes, [row["limit"] for row in own], ":", color=colour)
        low, high = axes.get_ylim()
        axes.set(xlabel=size, ylabel="processor seconds", ylim=(low, 30 * high))  # with room for the legend
        axes.set_xticks(sizes, [f"{value:,}" for value in sizes], fontsize=8)
        axes.minorticks_off()
        axes.legend(fontsize=7, loc="upper left")
    figure.savefig("cost.png")
    shrink(Path("cost.png"), DOCS / "images" / "cost.png")
    Path("cost.png").unlink()


def main() -> None:
    if "--cost" in sys.argv[1:]:
        return draw_cost()

    def emsplat(*words: str) -> None:
        code = subprocess.run([sys.executable, "-m", "emsplat", *words], cwd=folder).returncode
        if code not in (0, 1):  # 1: `check` asks for a look
            sys.exit(f"emsplat {' '.join(words)}: exit code {code}")

    images = DOCS / "images" / "tutorial"
    images.mkdir(parents=True, exist_ok=True)
    matplotlib.use("agg")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        names: dict[str, object] = {}
        exec(code_of((DOCS / "python.md").read_text()), names)
        names["figure"].savefig("python.png", dpi=100)  # type: ignore[attr-defined]
        shrink(Path("python.png"), images / "python.png")
        os.chdir(DOCS)
    with tempfile.TemporaryDirectory() as folder:
        emsplat("simulate", "-o", "particles", "--particles", "3000")
        emsplat("check", "particles/particles.star")
        emsplat("reconstruct", "particles/particles.star", "-o", "run")
        emsplat("assess", "run", "--reference", "particles/truth.mrc")
        emsplat("simulate", "-o", "harder", "--particles", "1000", "--snr", "0.03", "--pose-error", "2")
        emsplat("reconstruct", "harder/particles.star", "-o", "harder_run")
        emsplat("assess", "harder_run", "--reference", "harder/truth.mrc")
        for run, names in FIGURES.items():
            for name in names:
                shrink(Path(folder) / run / f"{name}.png", images / f"{run}_{name}.png")


if __name__ == "__main__":
    main()
