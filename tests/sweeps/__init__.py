"""Sweeps: every operation fails, every byte flips, every moment is a kill or a signal."""
