"""The quality report of a store: a page with a picture and the facts of each slide, and a table."""
