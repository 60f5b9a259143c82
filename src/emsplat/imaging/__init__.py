"""How a microscope shows a mixture: projection and the contrast transfer function."""
