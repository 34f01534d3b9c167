"""Numbers that JSON has and machines have not, and that Python has and JSON has not."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .forge import Attack, forge_text, sign_text, tree_text

TREES = {
    "NaN": "NaN",
    "Infinity": "Infinity",
    "minus Infinity": "-Infinity",
    "1e999": "1e999",
    "1e400 with many digits": "1" + "0" * 400 + ".0",
    "10000 digits": "9" * 10_000,
    "a million digits": "9" * 1_000_000,
    "exponent of 10000 digits": "1e" + "9" * 10_000,
    "hexadecimal": "0x10",
    "leading zero": "01",
    "plus": "+1",
    "only a minus": "-",
    "hex that is none": '{"t":"int","hex":"0x10"}',
    "hex with underscores": '{"t":"int","hex":"1_0"}',
    "hex with a newline": '{"t":"int","hex":"10\\n"}',
    "hex in other digits": '{"t":"int","hex":"\\u0661"}',
    "float of 15 digits": '{"t":"float","hex":"7ff800000000000"}',
    "float of 18 digits": '{"t":"float","hex":"7ff800000000000000"}',
    "float of text": '{"t":"float","hex":"not a number at"}',
    "complex of one half": '{"t":"complex","hex":"7ff8000000000000"}',
    "size of 2^63": '{"t":"size","dims":[9223372036854775808]}',
    "size of 4000 digits": '{"t":"size","dims":[' + "9" * 4000 + "]}",
    "size of floats": '{"t":"size","dims":[1.5]}',
    "tensor 0.5": '{"t":"tensor","i":0.5}',
    "tensor -1": '{"t":"tensor","i":-1}',
    "tensor 2^64": '{"t":"tensor","i":18446744073709551616}',
}
HARMLESS = {
    "1e-999": "1e-999",
    "4000 digits": "9" * 4000,
    "long hex": '{"t":"int","hex":"' + "f" * 1_000_000 + '"}',
    "minus zero in hex": '{"t":"int","hex":"-0"}',
}
RECORDS = {
    "metric of 1e999": '"metrics":{"a":1e999}',
    "metric of NaN": '"metrics":{"a":NaN}',
    "metric of 10000 digits": '"metrics":{"a":' + "9" * 10_000 + "}",
    "step of 10000 digits": '"step":' + "9" * 10_000,
    "step of 0.5": '"step":0.5',
    "world size of text": '"world_size":"1"',
    "time of numbers": '"time":5',
}


def tree(text: str, directory: Path) -> None:
    forge_text(directory, tree_text(text))


def record(member: str, directory: Path) -> None:
    """A member of checkpoint.json; the last one of its name counts."""
    forge_text(directory, tree_text("5"))
    text = (directory / "checkpoint.json").read_text()
    sign_text(directory, "{" + text[len('{"xxh3_128":"') + 34 : -1] + f",{member}}}")


ATTACKS = {
    **{name: Attack(partial(tree, text)) for name, text in TREES.items()},
    **{name: Attack(partial(tree, text), None) for name, text in HARMLESS.items()},
    **{name: Attack(partial(record, text)) for name, text in RECORDS.items()},
}
