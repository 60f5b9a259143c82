"""emsplat: cryo-EM reconstruction with mixtures of anisotropic 3D Gaussians."""


def __getattr__(name: str) -> str:
    """``__version__``, looked up when it is asked for: that takes longer than all the rest of this import."""
    if name == "__version__":
        from importlib.metadata import version

        return version("emsplat")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
