"""A checkpoint to live values: matched, then filled in place or made anew."""
