"""Slides: one file of pixels, whoever wrote it. `open_slide` is the way in."""
