"""Simulated particles of known structure."""
