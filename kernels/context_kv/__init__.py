"""Keys and values of context tokens: LayerNorm and all projections in one pass over them."""
