"""The loop that is being held up: a GPT-2-shaped Transformer over bytes, and AdamW."""

from __future__ import annotations

import contextlib
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn


class Block(nn.Module):
    """One layer of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """GPT-2 over bytes; input and output embedding are tied, as GPT-2's are."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions(at))))  # type: ignore[no-any-return]


class State:
    """What is saved, and what ways of saving want to know of it.

    Attributes:
        state: what a checkpoint is of: live objects, or dicts of tensors.
        steps: how far the training is; each save has another.
        device: where it is.
        guard: makes the context that an optimizer step is made in; for ways of saving that want
            one.
    """

    def __init__(self, state: dict[str, Any], device: str = "cpu") -> None:
        self.state = state
        self.steps = 0
        self.device = torch.device(device)
        self.guard: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def state_dicts(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            name: each if isinstance(each, dict) else each.state_dict()
            for name, each in self.state.items()
        }

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, ties once."""
        found: list[Any] = []
        for each in self.state.values():
            if isinstance(each, nn.Module):
                found += [*each.parameters(), *each.buffers()]
            elif isinstance(each, torch.optim.Optimizer):
                found += [value for state in each.state.values() for value in state.values()]
            else:
                found += each.values()
        return [value for value in found if isinstance(value, Tensor)]

    @property
    def state_bytes(self) -> int:
        """Bytes of all tensors, ties counted once."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Training(State):
    """Trains on the sources of Python's standard library, in fp32.

    Attributes:
        guard_seconds: what was waited for the guard, since somebody set this to 0.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        *,
        batch: int,
        context: int,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        model = Transformer(layers, width, heads, context)
        self.model = model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        super().__init__({"model": self.model, "optimizer": self.optimizer}, device)
        self.guard_seconds = 0.0
        self._batch, self._context = batch, context
        self._random = torch.Generator().manual_seed(0)
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = b"".join(path.read_bytes() for path in sources)
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def step(self) -> None:
        """Make one training step. On CUDA, returns before it is done."""
        starts = torch.randint(
            len(self._text) - self._context - 1, (self._batch,), generator=self._random
        )
        windows = torch.stack([self._text[at : at + self._context + 1] for at in starts.tolist()])
        windows = windows.to(self.device).long()
        logits = self.model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        # here, not after the step: so gradients are resident before a save as they are during one
        self.optimizer.zero_grad()
        loss.backward()
        begun = time.perf_counter()
        with self.guard():
            self.guard_seconds += time.perf_counter() - begun
            self.optimizer.step()
        self.steps += 1

    def synchronize(self) -> None:
        """Wait until the device has done all steps."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def trained_tensors(nbytes: int, steps: int) -> dict[str, Tensor]:
    """Return at least ``nbytes`` of fp32 that compress as trained values do, in many sizes.

    They are a small model and its AdamW after some steps, over and over with a little noise.
    """
    training = Training(2, 256, 4, batch=2, context=64)
    for _ in range(steps):
        training.step()
    tensors = [tensor.detach().float() for tensor in training.tensors]
    once = sum(tensor.nbytes for tensor in tensors)
    return {
        f"{copy}.{i}": tensor * (1 + 1e-3 * torch.randn_like(tensor))
        for copy in range(-(-nbytes // once))
        for i, tensor in enumerate(tensors)
    }
