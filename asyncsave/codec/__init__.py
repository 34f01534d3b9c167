"""Slots to frames and back: byte planes (`planes`), zstd (`zstd`), and both (`frame`)."""
