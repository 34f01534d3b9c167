"""Promises: what a user is told, held from end to end by the public door."""
