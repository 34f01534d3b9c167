"""Checkpoints, open and checked: one of them, the newest that is sound, the list of all.

The road of what is read::

    newest.py       a path becomes the newest sound checkpoint of its run (history.py)
    checkpoint.py   its files (files.py) become its tree and its leaves, believed once checked
    groups.py       leaves that share memory become extents of addresses, each with memory (fill.py)
    chunks.py       the chunks of those addresses fill that memory, in a few threads (workers.py)
"""
