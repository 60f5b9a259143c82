"""Shared fixtures."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    # Triton decides when a kernel is defined whether it will be compiled or interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
    # Before the first gradient: PyTorch counts the devices then. Beside CUDA it would take this one for that.
    import virtual_device

    virtual_device.make()

# The problems of the tests are small: threads would mostly wait for each other.
torch.set_num_threads(1)

# Shapes and types in signatures are checked while the tests run. Not those of `interface`: what a user hands in is its
# own to refuse.
_CHECKED = (
    *("assessment", "fitting", "imaging", "io", "kernels.reference", "maths", "measures", "models", "particles"),
    *("commandline", "parallel", "poses", "programs", "report", "run", "simulation", "sums", "types"),
)
install_import_hook([f"emsplat.{name}" for name in _CHECKED], "checked.typechecked")

settings.register_profile("emsplat", deadline=None, derandomize=True)
settings.load_profile("emsplat")


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As for what a script starts in the background. Tests press Ctrl-C in processes that would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def virtual_gpu(monkeypatch):
    """A device without hardware, with kernels (`virtual_device`)."""
    if torch.cuda.is_available():
        pytest.skip("CUDA is here: the tests marked gpu do the same on it")
    return virtual_device.install(monkeypatch)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device that there is."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def pytest_addoption(parser):
    parser.addoption("--error-for-skips", action="store_true", help="fail where a test is skipped, or none has run")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("--error-for-skips"):
        report.outcome, report.longrepr = "failed", f"skipped: {call.excinfo.value if call.excinfo else 'marked'}"
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """`-n auto`: the cores that this process was granted; a worker takes up to 2 GB."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    """A function that gives the STAR file of simulated particles, in a folder of the caller's own.

    Keywords are those of `SimulateConfig`. Each set of particles is simulated once for all tests.
    """
    from emsplat.config import SimulateConfig
    from emsplat.programs.simulate import simulate

    made = {}

    def give(**settings):
        config = SimulateConfig(**({"box": 32, "pixel_size": 4.0, "snr": 0.5, "atoms": 1500, "seed": 3} | settings))
        if config not in made:
            made[config] = simulate(config, None, tmp_path_factory.mktemp("simulated") / "particles").parent
        return shutil.copytree(made[config], tmp_path_factory.mktemp("particles") / "particles") / "particles.star"

    return give


def together(star: Path, other: Path, output: Path) -> Path:
    """Both sets of particles in one STAR file, as two optics groups; ``other`` names its images from that folder."""
    from gemmi import cif

    document, second = (cif.read_file(str(path)) for path in (star, other))
    for name, tag in (("optics", "_rlnOpticsGroupName"), ("particles", "_rlnImageName")):
        loop, more = (read.find_block(name).find_loop(tag).get_loop() for read in (document, second))
        group = loop.tags.index("_rlnOpticsGroup")
        for row in range(more.length()):
            values = [more[row, column] for column in range(more.width())]
            values[group] = "2"
            loop.add_row(values)
    document.write_file(str(output))
    return output


@pytest.fixture(autouse=True)
def short_report(request, monkeypatch):
    """Runs within a test have no report, which takes longer to draw than they do; the mark `report` draws it."""
    if request.node.get_closest_marker("report") is None:
        text = "left out; the test needs the mark report"
        monkeypatch.setattr("emsplat.report.write_report", lambda run, *_: (run / "report.html").write_text(text))


@pytest.fixture
def shared_data():
    """Experimental particles, atomic models and files of other programs, which are not part of the project."""
    folder = Path(os.environ.get("EMSPLAT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set EMSPLAT_TEST_DATA")
    return folder
