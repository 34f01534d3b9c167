"""Checkpoints that somebody made to do harm, one module for each idea.

A module says its idea in its docstring and has ``ATTACKS``, variant by name. An `Attack` builds a
checkpoint into an empty directory, whose checksums are all right unless they are the idea: it is
the validators that must notice. test_hostile.py runs each in a process of its own (runner.py) and
checks what `forge.Attack` promises about it.
"""
