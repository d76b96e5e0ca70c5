"""Tiling: from slides to features in a store. Entry point: `tile_slides`; see README.md."""
