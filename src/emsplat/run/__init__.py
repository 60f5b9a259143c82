"""The run folder and what a run says and writes while it works."""
