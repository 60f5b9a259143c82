"""Shared fixtures."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("emsplat", deadline=None, derandomize=True)
settings.load_profile("emsplat")


@pytest.fixture
def shared_data():
    """Experimental particles, atomic models and files of other programs, which are not part of the project."""
    folder = Path(os.environ.get("EMSPLAT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set EMSPLAT_TEST_DATA")
    return folder
