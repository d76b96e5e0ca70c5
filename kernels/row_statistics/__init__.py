"""Means and 1 / SDs of context rows, known before the products that need them."""
