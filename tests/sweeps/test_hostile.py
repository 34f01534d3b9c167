"""Hostile checkpoints: an error of ours, in bounded time and memory, and nothing is run or opened.

The attacks are in tests/sweeps/attacks, one module for each idea, and run in processes of
their own.
"""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import counts
from tests.sweeps import attacks as ideas
from tests.sweeps.attacks import runner

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("hostile")  # one runner for all
IDEAS = sorted({module.name for module in pkgutil.iter_modules(ideas.__path__)} - runner.QUIET)

# what collections.namedtuple evaluates: names, which were checked to be nothing else
NAMED_TUPLE = re.compile(r"compile lambda _cls, ([\w, ]+): _tuple_new\(_cls, \(\1,?\)\)")


class Results:
    """What the runner says of each attack, as far as it has come."""

    def __init__(self, scratch: Path) -> None:
        command = [sys.executable, "-m", "tests.sweeps.attacks.runner", str(scratch)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self._seen: dict[str, dict[str, Any]] = {}

    def of(self, name: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        while name not in self._seen:
            line = self.process.stdout.readline()
            assert line, f"the runner ended with {self.process.wait()} before {name}"
            result = json.loads(line)
            self._seen[result["name"]] = result
        return self._seen[name]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    found = Results(tmp_path_factory.mktemp("attacks"))
    yield found
    found.process.kill()
    found.process.communicate()


@pytest.mark.parametrize("idea", IDEAS)
def test_attack(idea: str, results: Results) -> None:
    ran = [(name, attack) for name, attack in runner.attacks() if name.startswith(f"{idea}: ")]
    assert ran
    faults = [
        f"{name}: {fault}" for name, attack in ran for fault in faults_of(attack, results.of(name))
    ]
    counts.add("hostile", len(ran))
    assert not faults, "\n".join(faults)


def faults_of(attack: runner.Attack, result: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with what an attack has come to."""
    if "died" in result:
        yield f"killed its process ({result['died']})"
        return
    load = result["load"]
    if load["error"] != attack.raises:
        yield f"load raised {load['error']} and not {attack.raises}: {load['text']:.300}"
    if attack.raises and attack.says not in load["text"]:
        yield f"the error does not say {attack.says!r} but {load['text']:.300}"
    for way in ("load", "restore", "keys", "verify"):
        did = result[way]
        if not did["ours"]:
            yield f"{way} raised {did['error']}: {did['trace']}"
        if did["seconds"] > attack.seconds:
            yield f"{way} took {did['seconds']:.1f} s"
        if did["error"] and not 20 < len(did["text"]) < 20_000:
            yield f"{way} says {did['text']:.300}"
        if did["error"] and not did["text"].replace("\n", "").isprintable():
            yield f"{way} prints {did['text']!r:.300}"
    if not result.get("unchanged", True):
        yield "restore raised, and had changed the state"
    if result["megabytes"] > attack.megabytes:
        yield f"took {result['megabytes']:.0f} MB"
    for deed in result["deeds"]:
        if not NAMED_TUPLE.fullmatch(deed):
            yield f"did {deed}"
    for path in result["opened"]:
        if not re.search(r"/attack/checkpoint/(checkpoint|rank-00000)\.(json|data)$", path):
            yield f"opened {path}"
