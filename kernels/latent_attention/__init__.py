"""Attention of a few latent queries to very many context tokens, per bag."""
