"""``python -m asyncsave``: the `asyncsave` command."""

from .cli import app

app(prog_name="asyncsave")
