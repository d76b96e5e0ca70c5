"""Means and 1 / SDs of context rows, computed before the products that need them."""
