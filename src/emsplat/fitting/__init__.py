"""Fitting: objectives, the loop, checkpoints, growth and the course of the one-pass engine."""
