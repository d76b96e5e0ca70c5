"""Heat maps: values of patches drawn over their slide, as GeoJSON, and as pictures of patches."""
