"""Whether an installed emsplat works: its command simulates particles and makes maps of them, in some seconds.

Run with the Python that it is installed for, from any folder: ``python packaging/smoke.py``.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    command = Path(sysconfig.get_path("scripts")) / "emsplat"

    def emsplat(*words: str) -> str:
        done = subprocess.run([command, *words], check=True, stdout=subprocess.PIPE, text=True, cwd=folder)
        return done.stdout

    with tempfile.TemporaryDirectory() as folder:
        said = emsplat("--version")
        print(said, end="")
        if version("emsplat") not in said:
            sys.exit(f"emsplat --version says {said!r}; expected {version('emsplat')}")
        emsplat("simulate", "-o", "particles", "--particles", "400", "--box", "32", "--pixel-size", "4", "--snr", "1")
        print(emsplat("backproject", "particles/particles.star", "-o", "run"), end="")
        summary = json.loads((Path(folder) / "run/summary.json").read_text())
        if summary["resolution"]["backprojection_masked"] is None:
            sys.exit("the back-projections of the halves do not agree anywhere; expected maps of a protein")


if __name__ == "__main__":
    main()
