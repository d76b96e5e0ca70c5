"""Tiling: from slides to features in a store. `tile_slides` is the way in; README.md."""
