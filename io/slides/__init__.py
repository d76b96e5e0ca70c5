"""Slides: read regions of one image file, of any format. Entry point: `open_slide`."""
