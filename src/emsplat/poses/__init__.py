"""Poses: refined against the images, searched for, compared."""
