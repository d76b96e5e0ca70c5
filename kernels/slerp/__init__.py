"""Spherical linear interpolation of whole tensors (MM-Lego, section 3.3)."""
