"""Doubles: a disk that fails, a disk that loses power, a device that is pretended."""
