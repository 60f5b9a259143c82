"""The compiled module itself: its description for type checkers, and what happens where memory ends."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emsplat import _native

_STUB = Path(__file__).parents[1] / "src" / "emsplat" / "_native.pyi"


def test_the_stub_is_that_of_the_module():
    """Made by ``python -m nanobind.stubgen -m emsplat._native -o src/emsplat/_native.pyi``."""
    stubgen = pytest.importorskip("nanobind.stubgen")
    maker = stubgen.StubGen(_native, quiet=True)
    maker.put(_native)
    assert re.sub(r"\s+", " ", maker.get()).strip() == re.sub(r"\s+", " ", _STUB.read_text()).strip()


_SHORT_OF_MEMORY = """
import resource, sys
import numpy as np
from emsplat import _native

size = 8192  # 268 MB of image, as much again for the threads that draw it
mixture = np.zeros((1, 3), "f4"), np.eye(3, dtype="f4")[None], np.ones(1, "f4")
pose = np.eye(3, dtype="f4")[None], np.zeros((1, 2), "f4")
_native.project(*mixture, *pose, 64, 1.0, 4.0, 4)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 4 * size**2 + 150 * 2**20,) * 2)
for _ in range(3):
    try:
        _native.project(*mixture, *pose, size, 1.0, 4.0, 4)
    except MemoryError:
        print("refused")
print(float(_native.project(*mixture, *pose, 64, 1.0, 4.0, 4).sum().round(3)))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is set from what Linux says is used")
def test_a_thread_without_memory_is_an_error_of_the_caller():
    done = subprocess.run([sys.executable, "-c", _SHORT_OF_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.split() == ["refused"] * 3 + ["1.0"]


@pytest.mark.parametrize("name", ["project", "project_each"])
def test_shapes_that_do_not_fit_are_refused(name):
    import numpy as np

    def zeros(*shape):
        return np.zeros(shape, np.float32)

    lead = () if name == "project" else (2,)
    good = [zeros(*lead, 5, 3), zeros(*lead, 5, 3, 3), zeros(*lead, 5), zeros(2, 3, 3), zeros(2, 2)]
    function = getattr(_native, name)
    for place, bad in enumerate(
        [zeros(*lead, 5, 2), zeros(*lead, 4, 3, 3), zeros(*lead, 6), zeros(2, 3, 2), zeros(3, 2)]
    ):
        with pytest.raises(ValueError, match="expected"):
            function(*good[:place], bad, *good[place + 1 :], 16, 1.0, 4.0, 1)
    if lead:
        with pytest.raises(ValueError, match="expected"):
            function(*(array[:1] for array in good[:3]), *good[3:], 16, 1.0, 4.0, 1)


@pytest.mark.slow
def test_kernels_of_an_arm64_processor_agree(tmp_path):
    """The baseline, which is all that there is on arm64 (NEON), built for both and run on the same numbers."""
    root = Path(__file__).parents[1]
    for needed in ("g++", "aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not on the path (Debian: g++, g++-aarch64-linux-gnu, qemu-user)")
    told = []
    for compiler, runner in (("g++", []), ("aarch64-linux-gnu-g++", ["qemu-aarch64"])):
        program = tmp_path / compiler
        flags = ["-static", "-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math"]  # as in CMakeLists.txt
        sources = [root / "tests" / "every_kernel.cpp", root / "native" / "splat_baseline.cpp"]
        subprocess.run([compiler, *flags, *sources, "-o", program], check=True)
        said = subprocess.run([*runner, program], check=True, capture_output=True).stdout
        told.append(np.frombuffer(said, np.float32))
    here, there = told
    assert len(here) == len(there) > 100_000
    assert np.isfinite(here).all()
    assert np.abs(here).max() > 1
    # Sums of up to some hundred terms, in the same order; products and additions are one operation there.
    assert np.abs(here - there).max() < 100 * np.finfo(np.float32).eps * np.abs(here).max()
