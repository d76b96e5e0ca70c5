"""Encoders: patches to rows of features. `load_encoder` is the way in."""
