"""Measures of maps: FSC, masks, cross-validation, local and directional resolution, sharpening."""
