"""Files in, house units out: particle metadata, image stacks, maps and Gaussians."""
