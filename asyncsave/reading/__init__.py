"""Checkpoints, open and checked: one of them, the newest that is sound, the list of all."""
