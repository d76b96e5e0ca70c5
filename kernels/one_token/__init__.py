"""Attention to a single token: its weight is 1, so that the result is the token's value."""
