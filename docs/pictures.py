"""Makes the pictures of the tutorials again: `python docs/pictures.py`, three minutes.

The run is that of `make demo`, with the same seeds; what it prints is what docs/tutorial.md quotes.
"""

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


def main() -> None:
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
