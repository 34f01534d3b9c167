"""Rooms: what each folder of asyncsave does, by the names that it gives."""
