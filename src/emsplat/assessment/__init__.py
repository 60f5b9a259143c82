"""The verdict on the maps of a run."""
