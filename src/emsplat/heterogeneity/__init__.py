"""Molecules that move and change: subspace, latents, cells, states."""
