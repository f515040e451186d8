"""Documents: read, cleaned, judged, deduplicated."""
