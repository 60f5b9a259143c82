"""Makes the pictures of the tutorials again: `python docs/pictures.py`, two minutes on two cores.

The run is that of `make demo`, with the same seeds; what it prints is what docs/tutorial.md quotes.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

FIGURES = ("slices", "fsc", "local_resolution_slices", "directions", "gaussians")
WIDTH = 1000  # pixels
DOCS = Path(__file__).parent


def shrink(picture: Path, target: Path) -> None:
    """A picture no wider than the page, with 128 colours."""
    image = Image.open(picture).convert("RGB")
    image.thumbnail((WIDTH, 10 * WIDTH))
    image.quantize(128).save(target, optimize=True)


def main() -> None:
    def emsplat(*words: str) -> None:
        code = subprocess.run([sys.executable, "-m", "emsplat", *words], cwd=folder).returncode
        if code not in (0, 1):  # 1: `check` asks for a look
            sys.exit(f"emsplat {' '.join(words)}: exit code {code}")

    images = DOCS / "images" / "tutorial"
    images.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        emsplat("simulate", "-o", "particles", "--particles", "3000")
        emsplat("check", "particles/particles.star")
        emsplat("reconstruct", "particles/particles.star", "-o", "run")
        emsplat("assess", "run", "--reference", "particles/truth.mrc")
        for name in FIGURES:
            shrink(Path(folder) / "run" / f"{name}.png", images / f"{name}.png")


if __name__ == "__main__":
    main()
