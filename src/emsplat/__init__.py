"""emsplat: cryo-EM reconstruction with mixtures of anisotropic 3D Gaussians."""

from importlib.metadata import version

__version__ = version("emsplat")
