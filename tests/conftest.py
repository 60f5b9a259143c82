"""Shared fixtures."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Triton decides when a kernel is defined whether it will be compiled or interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The problems of the tests are small: threads would mostly wait for each other.
torch.set_num_threads(1)

# Shapes in signatures are checked while the tests run.
_CHECKED = ("assess", "ctf", "fourier", "geometry", "io", "kernels.reference", "model", "project")
install_import_hook([f"emsplat.{name}" for name in _CHECKED], "beartype.beartype")

settings.register_profile("emsplat", deadline=None, derandomize=True)
settings.load_profile("emsplat")


@pytest.fixture
def shared_data():
    """Experimental particles, atomic models and files of other programs, which are not part of the project."""
    folder = Path(os.environ.get("EMSPLAT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set EMSPLAT_TEST_DATA")
    return folder
