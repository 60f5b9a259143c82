"""Sums over all images in Fourier space, and the equations that they are."""
