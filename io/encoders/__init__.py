"""Encoders: compute a row of features for each patch. Entry point: `load_encoder`."""
