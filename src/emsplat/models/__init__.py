"""Models: what is fitted to particles, mixtures of Gaussians, and where they start."""
