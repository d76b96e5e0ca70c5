"""Harmonic merge of complex latents (MM-Lego, Eq. 4)."""
