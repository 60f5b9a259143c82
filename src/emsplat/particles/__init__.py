"""Particles with their images: which ones, in which half-set, read, resampled, normalised."""
