"""Run the examples of the README: ``python tests/scripts/readme.py``.

Run by path and not as a module of this repository, so that what is imported is what was installed.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import textwrap
from pathlib import Path

import torch

import asyncsave

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run each block of Python in a directory that is new, and look at what came of it."""
    if Path(asyncsave.__file__).is_relative_to(ROOT / "asyncsave"):
        sys.exit("this is the source tree's asyncsave, not one that was installed")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    model = torch.nn.Sequential()
    model.add_module("encoder", torch.nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())

    def train_one_step() -> None:
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    names = {
        "model": model,
        "net": torch.nn.Linear(4, 4),
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "total": 1000,
        "train_one_step": train_one_step,
    }
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        for block in blocks:
            exec(compile(textwrap.dedent(block), "README.md", "exec"), names)
        assert [each.step for each in asyncsave.checkpoints("runs/gpt")] == [500, 1000]
        assert torch.equal(names["net"].weight, model.encoder.weight)  # type: ignore[attr-defined]
        assert sorted(os.listdir("epochs")) == ["3"]
        os.chdir(ROOT)
    print(f"the README's {len(blocks)} examples ran, with {asyncsave.__file__}")


if __name__ == "__main__":
    main()
