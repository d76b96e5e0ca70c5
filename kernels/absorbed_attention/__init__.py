"""Latent attention that takes the projections into the queries: K and V never exist."""
