"""FORMAT.md in code: bytes and records, believed only when checked. No threads, files or clock."""
