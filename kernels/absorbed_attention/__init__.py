"""Latent attention without K and V: their projections are multiplied into the queries."""
