"""RELION's STAR files, 3.0 and 3.1 or newer."""
