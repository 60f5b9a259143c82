"""Mathematics: Fourier transforms, rotations, point groups."""
