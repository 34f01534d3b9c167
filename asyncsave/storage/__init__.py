"""Stage 4: frames to durable bytes, and back."""
