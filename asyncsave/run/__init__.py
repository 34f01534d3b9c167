"""One training run: its directory, its cadence, what it keeps, its signals, its Checkpointer."""
