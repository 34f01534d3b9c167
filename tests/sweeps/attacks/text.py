"""Text that is none: half characters, other encodings, NULs, and what steers a terminal."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .forge import Attack, forge, forge_text, tree_text

BROKEN = {
    "lone surrogate, escaped": rb'"\ud800"',
    "surrogates the wrong way round": rb'"\udc00\ud800"',
    "lone surrogate, encoded": b'"\xed\xa0\x80"',
    "not UTF-8": b'"\xff\xfe"',
    "overlong": b'"\xc0\xaf"',
    "unknown escape": rb'"\x41"',
    "control character": b'"a\nb"',
    "no end": b'"abc',
    "base64 of something else": b'{"t":"bytes","data":"%%%%"}',
    "base64 without padding": b'{"t":"bytes","data":"YQ"}',
    "str that is no UTF-8": b'{"t":"str","data":"//79"}',
    "unknown kind": b'{"t":"pickle","data":"gASVAAAA"}',
    "kind of a number": b'{"t":5}',
    "no kind": b'{"a":1}',
    "a bare list": b"[1]",
}
SOUND = {
    "nul": rb'"\u0000"',
    "last character": b'"\xf4\x8f\xbf\xbf"',
    "a surrogate as it should be": b'{"t":"str","data":"7aCA"}',
}


def tree(text: bytes, directory: Path) -> None:
    before, after = tree_text("\0").encode().split(b"\0")
    forge_text(directory, before + text + after)


def whole(before: bytes, after: bytes, directory: Path) -> None:
    forge_text(directory, before + tree_text("5").encode() + after)


def other(encoding: str, directory: Path) -> None:
    forge_text(directory, tree_text("5").encode(encoding))


def escapes(directory: Path) -> None:
    """A key that would clear the screen of whoever reads the error."""
    forge(directory, {"t": "dict", "keys": ["\x1b[2J\x1b]0;owned\x07\n  ok"], "values": [1]})


ATTACKS = {
    **{name: Attack(partial(tree, text)) for name, text in BROKEN.items()},
    **{name: Attack(partial(tree, text), None) for name, text in SOUND.items()},
    "byte order mark": Attack(partial(whole, b"\xef\xbb\xbf", b"")),
    "something behind it": Attack(partial(whole, b"", b"{}")),
    "nul behind it": Attack(partial(whole, b"", b"\0")),
    "UTF-16": Attack(partial(other, "utf-16")),
    "UTF-32": Attack(partial(other, "utf-32")),
    "escapes": Attack(escapes, None),
}
