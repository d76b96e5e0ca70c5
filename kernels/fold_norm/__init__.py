"""A LayerNorm's gain and shift, folded into the weights that follow it."""
