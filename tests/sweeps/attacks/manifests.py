"""checkpoint.json that is not what it must be, from its first byte on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .forge import Attack, digest, forge


def build(text: bytes, directory: Path) -> None:
    forge(directory, 5)
    (directory / "checkpoint.json").write_bytes(text)


def signed(rest: bytes) -> bytes:
    return b'{"xxh3_128":"' + digest(rest).encode() + rest


ATTACKS = {
    "empty": Attack(partial(build, b""), "IntegrityError"),
    "only the beginning": Attack(partial(build, b'{"xxh3_128":"'), "IntegrityError"),
    "digest of nothing": Attack(partial(build, signed(b""))),
    "spaces": Attack(partial(build, b'{ "xxh3_128": "0"}'), "IntegrityError"),
    "a list": Attack(partial(build, signed(b'"]'))),
    "no members": Attack(partial(build, signed(b'"}'))),
    "only a format": Attack(partial(build, signed(b'","format":1}'))),
    "format of text": Attack(partial(build, signed(b'","format":"1"}'))),
    "later format, other members": Attack(
        partial(build, signed(b'","format":2,"ranks":"elsewhere"}')), "UnsupportedVersionError"
    ),
    "pickle": Attack(partial(build, b"\x80\x04\x95cos\nsystem\n(S'id'\ntR."), "IntegrityError"),
    "zip": Attack(partial(build, b"PK\x03\x04" + bytes(100)), "IntegrityError"),
}
