"""How coarse an expert may be: calibration, merging, decomposition, rounding, and the choice among them."""
