"""A LayerNorm's gain and shift, taken into the weights that follow it."""
