"""emsplat: cryo-EM reconstruction with mixtures of anisotropic 3D Gaussians."""

import os
from importlib.metadata import version

# Threads that wait for others shall sleep: where they spin, a step takes many times as long beside other busy programs.
# OpenMP reads this when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = version("emsplat")
