"""The feature store: a folder of slides' features, read, written and checked; README.md."""
