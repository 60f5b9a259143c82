"""Measures of maps, on tensors [z, y, x] with a `Grid` for the pixel size; `emsplat.assessment` asks them of a run.

`fsc`: shell correlation, its corrections, the rules of resolution. `mask`. `crossvalidate`: models against data that
they have not seen. `local_resolution`. `directional`: slices, cones, sampling. `sharpening`: Guinier's plot, weights.
"""
