"""Stage 1: what is saved. State trees to named leaves, leaves to chunks. No threads, no files."""
