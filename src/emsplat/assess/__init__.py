"""How good a map is: Fourier shell correlation, resolution, masks."""
