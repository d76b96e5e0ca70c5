"""Models, losses, survival and training. What users import is listed in the package's root."""
